"""Drops what was seen before: equal documents, repeated paragraphs, code mostly seen, repeated licence headers."""

from __future__ import annotations

import hashlib
import re

from model.corpus.recipe import Domain

PARAGRAPH_BYTES = 40
"""Shorter paragraphs may repeat: headings, options, prompts."""
LINE_BYTES = 40
"""Shorter lines say little about where a file comes from."""
HEADER_BYTES = 200
"""Shorter comments at the head of a file are no licence."""

_HEADER = re.compile(rb"((?:#!.*\n)?(?:#.*coding.*\n)?\n*)((?:#.*\n)+)")
_SIDES = re.compile(rb"(\n[ \t]*)+\n")


class SeenSet:
    """Byte strings seen so far, in a fixed 64 MiB (a Bloom filter).

    With ten million strings it mistakes about three new ones in a hundred thousand for seen ones; it never forgets.
    """

    BITS = 1 << 29
    HASHES = 4

    def __init__(self) -> None:
        self.bits = bytearray(self.BITS // 8)

    def __contains__(self, text: bytes) -> bool:
        return all(self.bits[place >> 3] & 1 << (place & 7) for place in self._places(text))

    def add(self, text: bytes) -> None:
        """Remember a string."""
        for place in self._places(text):
            self.bits[place >> 3] |= 1 << (place & 7)

    def _places(self, text: bytes) -> list[int]:
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest())
        return [(digest >> 32 * number) % self.BITS for number in range(self.HASHES)]


class Deduplicator:
    """What one domain has seen. Documents must come in a fixed order: the first of its kind stays."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.documents: set[bytes] = set()
        self.seen = SeenSet() if domain.repeats != "documents" else None

    def reduce(self, text: bytes) -> tuple[bytes, str | None]:
        """What is left of a document, and why it is dropped or None.

        A document that is dropped leaves no trace, except that an equal one is still equal.
        """
        digest = hashlib.blake2b(text, digest_size=16).digest()
        if digest in self.documents:
            return text, "equal_document"
        self.documents.add(digest)
        if self.seen is None:
            return text, None
        if self.domain.repeats == "paragraphs":
            return self._without_paragraphs(text, self.seen)
        return self._unless_lines_seen(text, self.seen)

    def _without_paragraphs(self, text: bytes, seen: SeenSet) -> tuple[bytes, str | None]:
        kept, new = [], set()
        for paragraph in _paragraphs(text):
            key = b" ".join(paragraph.split())
            if len(key) >= PARAGRAPH_BYTES:
                if key in new or key in seen:
                    continue
                new.add(key)
            kept.append(paragraph)
        left = b"".join(kept).strip(b"\n") + b"\n"
        if len(left) < self.domain.min_bytes:
            return left, "repeated_paragraphs"
        for key in new:
            seen.add(key)
        return left, None

    def _unless_lines_seen(self, text: bytes, seen: SeenSet) -> tuple[bytes, str | None]:
        text = self._without_header(text, seen)
        if len(text) < self.domain.min_bytes:
            return text, "repeated_header"
        lines = [line for line in map(bytes.strip, text.split(b"\n")) if len(line) >= LINE_BYTES]
        if sum(len(line) for line in lines if line in seen) > self.domain.max_seen * len(text):
            return text, "mostly_seen"
        for line in lines:
            seen.add(line)
        return text, None

    @staticmethod
    def _without_header(text: bytes, seen: SeenSet) -> bytes:
        found = _HEADER.match(text)
        if found is None or len(found[2]) < HEADER_BYTES:
            return text
        if found[2] in seen:
            return (found[1] + text[found.end() :].lstrip(b"\n")).lstrip(b"\n")
        seen.add(found[2])
        return text


def _paragraphs(text: bytes) -> list[bytes]:
    """Runs of lines, each with the empty lines that follow it; joined they are the text."""
    pieces, start = [], 0
    for gap in _SIDES.finditer(text):
        pieces.append(text[start : gap.end()])
        start = gap.end()
    return [*pieces, text[start:]]
