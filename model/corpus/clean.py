"""Makes clean text of what was extracted, or says why a document is dropped."""

from __future__ import annotations

import re

from model.corpus.recipe import Domain

_CONTROL = bytes(set(range(32)) - set(b"\t\n\f")) + b"\x7f"
_CONTINUATION = bytes(range(0x80, 0xC0))
_NON_ASCII = bytes(range(0xC0, 0x100))  # each begins a character of several bytes
_DIGITS = b"0123456789"
_LETTERS = bytes(range(65, 91)) + bytes(range(97, 123)) + b" \t\n\f"
_GENERATED = re.compile(
    rb"@generated|do not (edit|modify)|auto(matically)?[ -]?generated|machine[ -]generated|"
    rb"(file|module|code|is|was|been) generated (by|from|with|using)",
    re.IGNORECASE,
)
_HEAD = 1000

EMAIL = re.compile(rb"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}")


def normalise(raw: bytes) -> bytes | None:
    """UTF-8 with unix line ends, no byte order mark and one line end at the end; None if it is not UTF-8."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n").strip("\n").encode() + b"\n"


def reason_to_drop(text: bytes, domain: Domain) -> str | None:
    """Why a normalised document does not belong in a domain; None if it does. Checked in the order of the code."""
    size = len(text)
    if size < domain.min_bytes:
        return "too_short"
    if size > domain.max_bytes:
        return "too_long"
    if len(text.translate(None, _CONTROL)) < size:
        return "control_characters"
    if max(map(len, text.split(b"\n"))) > domain.max_line:
        return "long_line"
    if _share(text.translate(None, _CONTINUATION), _NON_ASCII) > domain.max_non_ascii:
        return "non_ascii"
    if _share(text, _DIGITS) > domain.max_digits:
        return "digits"
    if _share(text, _LETTERS) < domain.min_letters:
        return "few_letters"
    if domain.drop_generated and _GENERATED.search(text[:_HEAD]):
        return "generated"
    return None


def _share(text: bytes, characters: bytes) -> float:
    return (len(text) - len(text.translate(None, characters))) / len(text)


def parts(text: bytes, size: int) -> list[bytes]:
    """Cut a text into parts of at least ``size`` bytes (the last one may be shorter), which joined are the text.

    A part ends with an empty line if there is one before it is twice as long, or else at the next end of a line.
    """
    cut = []
    start = 0
    while len(text) - start > size:
        end = text.find(b"\n\n", start + size - 2, start + 2 * size)
        end = end + 2 if end >= 0 else text.find(b"\n", start + size - 1) + 1
        if end == 0:
            break
        cut.append(text[start:end])
        start = end
    return [*cut, text[start:]] if start < len(text) else cut
