"""Reads one source's archive into cleaned documents; runs in a process of its own."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from model.corpus.archives import read_files
from model.corpus.clean import normalise, parts, reason_to_drop
from model.corpus.extract import extract
from model.corpus.fetch import Archive
from model.corpus.recipe import Domain, Source

_LICENCE = re.compile(
    r"\.dist-info/(licenses/.*|[^/]*(LICEN[CS]E|COPYING|NOTICE)[^/]*)$|^usr/share/doc/[^/]+/copyright$", re.IGNORECASE
)


@dataclass(slots=True)
class Tally:
    """Documents and bytes by what became of them. Bytes are of the extracted text."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def count(self, fate: str, size: int) -> None:
        """Count a document."""
        self.documents[fate] += 1
        self.bytes[fate] += size

    def trim(self, reason: str, size: int) -> None:
        """Count bytes that were taken out of a document which stays."""
        if size:
            self.bytes[reason] += size


@dataclass(slots=True)
class Reading:
    """What one source holds."""

    documents: list[tuple[str, bytes]]
    """Path and text of what passed the filters, in the order of the paths."""
    tally: Tally
    """Of what did not."""
    licences: dict[str, bytes]
    """The package's own licence files by path."""


def read_source(source: Source, archive: Archive, domain: Domain) -> Reading:
    """Extract and clean one source. A pure function of its arguments.

    Raises:
        BuildError: the archive or a file in it is damaged.
    """
    tally = Tally()
    documents: list[tuple[str, bytes]] = []
    licences: dict[str, bytes] = {}
    for name, content in read_files(archive.path, lambda path: source.wants(path) or bool(_LICENCE.search(path))):
        if _LICENCE.search(name):
            licences[name] = content
        elif source.excludes(name):
            tally.count("excluded_path", len(content))
        else:
            for path, raw in extract(source.group.extract, name, content):
                _clean(f"{source.path}/{path}", raw, domain, tally, documents)
    documents.sort()
    return Reading(documents, tally, dict(sorted(licences.items())))


def _clean(path: str, raw: bytes, domain: Domain, tally: Tally, documents: list[tuple[str, bytes]]) -> None:
    text = normalise(raw)
    if text is None:
        tally.count("not_utf8", len(raw))
        return
    tally.trim("line_ends", len(raw) - len(text))
    cut = [text] if domain.part_bytes is None else parts(text, domain.part_bytes)
    for number, part in enumerate(cut):
        reason = reason_to_drop(part, domain)
        if reason is None:
            documents.append((path if len(cut) == 1 else f"{path}#{number:03}", part))
        else:
            tally.count(reason, len(part))
