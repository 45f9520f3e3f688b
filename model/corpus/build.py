"""Builds a corpus: fetch, read in parallel, then deduplicate, split and write in the recipe's order."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.corpus.clean import EMAIL
from model.corpus.dedup import Deduplicator
from model.corpus.errors import BuildError
from model.corpus.extract import require_lxml
from model.corpus.fetch import Archive, Fetcher, missing_debian_tools
from model.corpus.read import Reading, Tally, read_source
from model.corpus.recipe import Domain, Recipe, Source
from model.corpus.split import TEST, UNSEEN, is_unseen, rank, split_of
from model.corpus.write import CorpusWriter

MANIFEST = "manifest.json"
LICENCES = "licences"
KEPT = "kept"


@dataclass(frozen=True, slots=True)
class Build:
    """What to build, and how."""

    output: Path
    """Folder that is made; it must not exist."""
    cache: Path
    """Folder of fetched archives, kept for the next build."""
    domains: list[str] | None = None
    """None for every domain of the recipe."""
    jobs: int = 1


@dataclass(slots=True)
class _Account:
    """What one source gave."""

    source: Source
    archive: Archive
    tally: Tally
    splits: dict[str, Counter[str]] = field(default_factory=dict)
    emails: int = 0


def build(settings: Build, recipe: Recipe, fetcher: Fetcher | None = None) -> dict[str, Any]:
    """Make the corpus in ``settings.output`` and return its manifest.

    The same archives give the same bytes, whatever ``jobs`` is. The folder appears when it is whole; a failure leaves
    only the cache.

    Raises:
        BuildError: the output exists, a tool or package is missing, an archive is damaged or not the expected one.
    """
    if settings.output.exists():
        raise BuildError(f"{settings.output} exists: name a folder that does not, or remove it")
    sources, left_out = _available(recipe.sources(settings.domains))
    archives = (fetcher or Fetcher(settings.cache)).fetch_all(sources, settings.jobs)
    partial = settings.output.with_name(f".{settings.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        accounts, files = _write(_in_order(sources), archives, recipe, partial, settings.jobs)
        manifest = _manifest(accounts, files, left_out)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        partial.rename(settings.output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _available(sources: list[Source]) -> tuple[list[Source], list[Source]]:
    missing = missing_debian_tools()
    left_out = [source for source in sources if source.group.kind == "debian"] if missing else []
    kept = [source for source in sources if source not in left_out]
    if left_out:
        names = ", ".join(source.name for source in left_out)
        said = f"{' and '.join(missing)} not found: {len(left_out)} Debian packages are left out: {names}"
        tqdm.write(said, file=sys.stderr)
    empty = {source.group.domain for source in left_out} - {source.group.domain for source in kept}
    if empty:
        chosen = sorted({source.group.domain for source in kept})
        raise BuildError(
            f"{' and '.join(missing)} not found, and every source of {', '.join(sorted(empty))} is a Debian package: "
            f"choose other domains{f', such as --only {chosen[0]}' if chosen else ''}"
        )
    if any(source.group.extract == "html" for source in kept):
        require_lxml()
    return kept, left_out


def _is_set_apart(source: Source) -> bool:
    return source.group.unseen_projects and is_unseen(source.name)


def _in_order(sources: list[Source]) -> list[Source]:
    """Projects that no training document comes from last: what they share with the others is dropped from them."""
    return sorted(sources, key=_is_set_apart)


def _readings(
    sources: list[Source], archives: dict[str, Archive], recipe: Recipe, jobs: int
) -> Iterator[tuple[Source, Reading]]:
    """Read sources, at most ``jobs + 1`` of them in memory, in their order."""
    tasks = [(source, archives[source.path], recipe.domain[source.group.domain]) for source in sources]
    if jobs == 1:
        for task in tasks:
            yield task[0], read_source(*task)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running: deque[tuple[Source, Future[Reading]]] = deque()
        try:
            for task in tasks:
                running.append((task[0], pool.submit(read_source, *task)))
                if len(running) > jobs:
                    source, reading = running.popleft()
                    yield source, reading.result()
            for source, reading in running:
                yield source, reading.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write(
    sources: list[Source], archives: dict[str, Archive], recipe: Recipe, folder: Path, jobs: int
) -> tuple[list[_Account], dict[str, dict[str, int | str]]]:
    accounts = []
    deduplicators: dict[str, Deduplicator] = {}
    with CorpusWriter(folder) as writer, tqdm(total=len(sources), desc="read", unit="package") as bar:
        for source, reading in _readings(sources, archives, recipe, jobs):
            bar.set_postfix_str(source.name)
            name = source.group.domain
            domain = recipe.domain[name]
            seen = deduplicators.setdefault(name, Deduplicator(domain))
            account = _Account(source, archives[source.path], reading.tally)
            for path, text in _unique(reading, seen, domain, account.tally):
                split = TEST if not domain.splits else UNSEEN if _is_set_apart(source) else split_of(_whole(path))
                writer.add(name, split, path, text)
                account.tally.count(KEPT, len(text))
                account.splits.setdefault(split, Counter()).update(documents=1, bytes=len(text))
                account.emails += len(EMAIL.findall(text))
            _write_licences(folder / LICENCES, source, reading)
            accounts.append(account)
            bar.update()
    return accounts, writer.figures()


def _whole(path: str) -> str:
    """The path of the document that a part was cut from, so that its parts stay together."""
    return path.partition("#")[0]


def _unique(reading: Reading, seen: Deduplicator, domain: Domain, tally: Tally) -> list[tuple[str, bytes]]:
    """What is new among a source's documents, up to the most that a source may give, in the order of the paths."""
    documents = reading.documents
    if sum(len(text) for _, text in documents) > domain.max_source_bytes:
        documents = sorted(documents, key=lambda document: rank(document[0]))
    kept, size = [], 0
    for path, text in documents:
        if size >= domain.max_source_bytes:
            tally.count("over_source_limit", len(text))
            continue
        left, reason = seen.reduce(text)
        if reason is None:
            tally.trim("trimmed_repeats", len(text) - len(left))
            kept.append((path, left))
            size += len(left)
        else:
            tally.count(reason, len(text))
    return sorted(kept)


def _write_licences(folder: Path, source: Source, reading: Reading) -> None:
    if reading.licences:
        folder.mkdir(exist_ok=True)
        texts = [f"== {name}\n\n".encode() + text.rstrip() + b"\n" for name, text in reading.licences.items()]
        (folder / f"{Path(source.path).name}.txt").write_bytes(b"\n".join(texts))


def _manifest(
    accounts: list[_Account], files: dict[str, dict[str, int | str]], left_out: list[Source]
) -> dict[str, Any]:
    domains: dict[str, Tally] = {}
    for account in accounts:
        total = domains.setdefault(account.source.group.domain, Tally())
        total.documents.update(account.tally.documents)
        total.bytes.update(account.tally.bytes)
    return {
        "files": files,
        "domains": {name: _figures(tally) for name, tally in domains.items()},
        "sources": [_source_figures(account) for account in accounts],
        "left_out": [source.path for source in left_out],
    }


def _figures(tally: Tally) -> dict[str, Any]:
    """Documents and bytes found (the sum of the rest), kept and dropped by reason."""
    figures = {}
    for name, counts in (("documents", tally.documents), ("bytes", tally.bytes)):
        dropped = {reason: count for reason, count in sorted(counts.items()) if reason != KEPT}
        figures[name] = {"found": counts.total(), KEPT: counts[KEPT], "dropped": dropped}
    return figures


def _source_figures(account: _Account) -> dict[str, Any]:
    source, archive = account.source, account.archive
    expected = source.pin.sha256
    return {
        "name": source.name,
        "path": source.path,
        "domain": source.group.domain,
        "kind": source.group.kind,
        "licence": source.pin.licence,
        "pinned": source.pin.version,
        "version": archive.version,
        "archive": archive.path.name,
        "sha256": archive.sha256,
        "drifted": expected is not None and archive.sha256 != expected,
        **_figures(account.tally),
        "splits": {name: dict(counts) for name, counts in sorted(account.splits.items())},
        "email_like_strings": account.emails,
    }
