"""Takes small evaluation texts from a built corpus, so that a model can be evaluated without building one."""

from __future__ import annotations

import json
import lzma
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.corpus.build import LICENCES, MANIFEST
from model.corpus.clean import parts
from model.corpus.errors import BuildError
from model.corpus.split import TEST, UNSEEN, rank
from model.corpus.write import END

DOCUMENTS = 8
"""An excerpt holds at least about this many documents: longer ones are cut."""
LONGEST_LICENCE = 20_000
"""Sources whose licence files are longer, or missing, are passed over: the files are shipped with the excerpts."""


def excerpts(built: Path, output: Path, size: int) -> dict[str, dict[str, int]]:
    """Write ``<domain>.txt.xz`` of documents or their beginnings, ``NOTICE.md`` and licence files.

    Each is of at most ``size`` bytes. Of a domain with projects set apart, those are used, else its test split. Sources
    take turns; which of their documents come first is decided by a hash of the path. Returns documents and bytes per
    domain.

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
    limit = size // DOCUMENTS
    turns: Counter[str] = Counter()
    candidates = []
    for path, text in sorted(_documents(built, f"{domain}.{split}"), key=lambda document: rank(document[0])):
        source = _source_of(path)
        beginning = text if len(text) <= limit else parts(text, max(1, limit // 2))[0]
        if _has_short_licence(built, source) and len(beginning) <= limit:
            candidates.append((turns[source], path, beginning))
            turns[source] += 1
    chosen, total = [], 0
    for _, path, text in sorted(candidates, key=lambda candidate: candidate[0]):
        if total + len(text) + len(END) <= size:
            chosen.append((path, text))
            total += len(text) + len(END)
    return sorted(chosen)


def _source_of(path: str) -> str:
    return "/".join(path.split("/", 2)[:2])


def _licence_file(built: Path, source: str) -> Path:
    return built / LICENCES / f"{source.partition('/')[2]}.txt"


def _has_short_licence(built: Path, source: str) -> bool:
    path = _licence_file(built, source)
    return path.exists() and path.stat().st_size <= LONGEST_LICENCE


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
        "Documents for evaluation, or their beginnings, as `rheostat data build` cleaned and `rheostat data excerpts`",
        "chose them.",
        f"Each remains under the licence of its package, which is in `{LICENCES}/` as the package ships it.",
    ]
    sources = {source["path"]: source for source in manifest["sources"]}
    for domain, documents in chosen.items():
        lines += ["", f"## {domain}", "", "| package | version | licence | document |", "|---|---|---|---|"]
        for path, _ in documents:
            source = sources[_source_of(path)]
            name = path.removeprefix(f"{_source_of(path)}/")
            lines.append(f"| {source['name']} | {source['version']} | {source['licence']} | `{name}` |")
            licence = _licence_file(built, _source_of(path))
            (output / LICENCES).mkdir(exist_ok=True)
            shutil.copyfile(licence, output / LICENCES / licence.name)
    (output / "NOTICE.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
