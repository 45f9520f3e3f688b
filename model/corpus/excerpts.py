"""Takes small evaluation texts from a built corpus, so that a model can be evaluated without building one."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.corpus.build import LICENCES, MANIFEST
from model.corpus.errors import BuildError
from model.corpus.split import TEST, UNSEEN, rank
from model.corpus.write import END

LARGEST_SHARE = 4
"""No document takes more than this part (one over it) of an excerpt."""


def excerpts(built: Path, output: Path, size: int) -> dict[str, dict[str, int]]:
    """Write ``<domain>.txt.xz`` of whole documents, of about ``size`` bytes each, ``NOTICE.md`` and licence files.

    Of a domain with projects set apart, those are used, else its test split. The choice is by a hash of the path.
    Returns documents and bytes per domain.

    Raises:
        BuildError: ``built`` is not a built corpus, or ``output`` exists.
    """
    if output.exists():
        raise BuildError(f"{output} exists: name a folder that does not, or remove it")
    try:
        manifest = json.loads((built / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BuildError(f"{built} holds no {MANIFEST}: it is not a built corpus") from error
    chosen = {domain: _choose(built, domain, size) for domain in manifest["domains"]}
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for domain, documents in chosen.items():
            text = b"".join(text + END for _, text in documents)
            (partial / f"{domain}.txt.xz").write_bytes(lzma.compress(text, preset=9))
        _write_notice(built, partial, manifest, chosen)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        domain: {"documents": len(documents), "bytes": sum(len(text) + 1 for _, text in documents)}
        for domain, documents in chosen.items()
    }


def _choose(built: Path, domain: str, size: int) -> list[tuple[str, bytes]]:
    split = UNSEEN if (built / f"{domain}.{UNSEEN}.txt.xz").exists() else TEST
    chosen, total = [], 0
    for path, text in sorted(_documents(built, f"{domain}.{split}"), key=lambda document: rank(document[0])):
        if len(text) * LARGEST_SHARE <= size and total + len(text) <= size:
            chosen.append((path, text))
            total += len(text)
    return sorted(chosen)


def _documents(built: Path, name: str) -> Iterator[tuple[str, bytes]]:
    text = lzma.decompress((built / f"{name}.txt.xz").read_bytes())
    for row in lzma.decompress((built / f"{name}.index.tsv.xz").read_bytes()).decode().splitlines():
        path, start, length = row.split("\t")
        yield path, text[int(start) : int(start) + int(length)]


def _write_notice(
    built: Path, output: Path, manifest: dict[str, Any], chosen: dict[str, list[tuple[str, bytes]]]
) -> None:
    lines = [
        "# Where the excerpts come from",
        "",
        "Whole documents for evaluation, as `rheostat data build` cleaned and `rheostat data excerpts` chose them.",
        f"Each remains under the licence of its package, which is in `{LICENCES}/` as the package ships it.",
    ]
    sources = {f"{source['group']}/{source['name']}": source for source in manifest["sources"]}
    for domain, documents in chosen.items():
        lines += ["", f"## {domain}", "", "| package | version | licence | document |", "|---|---|---|---|"]
        for path, _ in documents:
            source = sources["/".join(path.split("/", 2)[:2])]
            name = path.split("/", 2)[2]
            lines.append(f"| {source['name']} | {source['version']} | {source['licence']} | `{name}` |")
            licence = built / LICENCES / f"{source['name']}.txt"
            if licence.exists():
                (output / LICENCES).mkdir(exist_ok=True)
                shutil.copyfile(licence, output / LICENCES / licence.name)
    (output / "NOTICE.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
