"""Bytes as tokens, plus one separator."""

from __future__ import annotations

from collections.abc import Iterable

DOCUMENT = 256
"""The document separator: the first token of every sequence, and the token that ends a generation."""

VOCAB_SIZE = 257


class ByteTokenizer:
    """UTF-8 bytes 0..255 and ``DOCUMENT`` (256). Stateless, so one instance serves every thread."""

    vocab_size: int = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        """``[DOCUMENT]`` followed by the UTF-8 bytes of ``text``.

        Raises:
            UnicodeEncodeError: ``text`` holds a lone surrogate, which no UTF-8 can carry.
        """
        return [DOCUMENT, *text.encode("utf-8")]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``: separators dropped, invalid UTF-8 shown as U+FFFD."""
        return bytes(token for token in tokens if token != DOCUMENT).decode("utf-8", errors="replace")
