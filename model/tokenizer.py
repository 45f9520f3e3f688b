"""Tokens: what a tokenizer gives, and bytes as tokens, plus one separator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

DOCUMENT = 256
"""The separator of documents where tokens are bytes: it begins every sequence, and ends a generation."""

VOCAB_SIZE = 257
"""Of bytes and their separator."""


class Tokenizer(ABC):
    """Text to token ids and back. Immutable, so one instance serves every thread.

    A long text may take a second to cut into subwords: not on an event loop.
    """

    vocab_size: int
    """The model's: ids are 0 to this, not included. Some may stand for nothing."""
    unit: str
    """What messages call a token."""
    start: int
    """The token that begins a sequence where nothing else does."""
    ends: frozenset[int]
    """The tokens that end a generation."""

    @abstractmethod
    def tokens(self, text: str) -> list[int]:
        """The tokens of ``text`` alone; may be empty.

        Raises:
            UnicodeEncodeError: ``text`` holds a lone surrogate, which no UTF-8 can carry.
        """

    def tokens_of_bytes(self, content: bytes) -> list[int]:
        """The tokens of a text in UTF-8.

        Raises:
            UnicodeDecodeError: ``content`` is no UTF-8.
        """
        return self.tokens(content.decode("utf-8"))

    @abstractmethod
    def begin(self, tokens: Sequence[int], *, text: bool) -> list[int]:
        """A prompt as the model reads it, never empty: ``tokens``, after ``start`` where it is due and not yet there.

        Args:
            text: they came from a text, not from a client that chose the ids.
        """

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The very bytes that a token adds to a text; none for a token that stands for no text."""

    @abstractmethod
    def token_name(self, token: int) -> str:
        """A token as a string of its own, where bytes may be no text."""

    @abstractmethod
    def token_text(self, token: int) -> str | None:
        """What is read as this token, wherever it stands in a text; None where nothing is."""

    def encode(self, text: str) -> list[int]:
        """The prompt that ``text`` is. Raises as :meth:`tokens`."""
        return self.begin(self.tokens(text), text=True)

    def join(self, tokens: Iterable[int]) -> bytes:
        """The bytes of ``tokens`` in a row."""
        return b"".join(map(self.token_bytes, tokens))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``; invalid UTF-8 is shown as U+FFFD."""
        return self.join(tokens).decode("utf-8", errors="replace")

    def require_vocabulary(self, name: str, vocab_size: int) -> None:
        """Assure that the ids are those of a model called ``name``.

        Raises:
            ValueError: they are not.
        """
        if self.vocab_size != vocab_size:
            raise ValueError(f"{name}: vocab_size = {vocab_size} must be {self.vocab_size} to read {self.unit}s")


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255 and ``DOCUMENT`` (256), which begins every prompt. Stateless."""

    vocab_size = VOCAB_SIZE
    unit = "byte"
    start = DOCUMENT
    ends = frozenset({DOCUMENT})

    def tokens(self, text: str) -> list[int]:
        """The UTF-8 bytes of ``text``."""
        return self.tokens_of_bytes(text.encode("utf-8"))

    def tokens_of_bytes(self, content: bytes) -> list[int]:
        """Any bytes, UTF-8 or not."""
        return list(content)

    def begin(self, tokens: Sequence[int], *, text: bool) -> list[int]:
        """``tokens``, after a separator unless they begin with one."""
        del text
        return [*tokens] if tokens and tokens[0] == DOCUMENT else [DOCUMENT, *tokens]

    def token_bytes(self, token: int) -> bytes:
        """The byte; none for the separator."""
        return b"" if token == DOCUMENT else bytes([token])

    def token_name(self, token: int) -> str:
        """ASCII as it is, a byte of a longer character as ``bytes:\\xe2``."""
        return "<|document|>" if token == DOCUMENT else name_bytes(bytes([token]))

    def token_text(self, token: int) -> str | None:
        """An ASCII character; None for the separator, and for parts of longer characters."""
        return chr(token) if token < 128 else None


def name_bytes(content: bytes) -> str:
    """``content`` as text, or as ``bytes:\\xe2\\x82`` where it is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
