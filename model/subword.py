"""Subwords as tokens: a ``tokenizer.json`` of byte-level pieces, read by the ``tokenizers`` library.

Source: the byte alphabet of Radford et al. 2019 (GPT-2), in which every byte is one printable character.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from model.tokenizer import Tokenizer, name_bytes

_PROBE = "a"
_BYTE_LEVEL = "ByteLevel"
_UTF8 = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]
"""Bytes that UTF-8 can hold."""


class SubwordError(ValueError):
    """A ``tokenizer.json`` is damaged, or of a kind that cannot be read and written exactly."""


class SubwordTokenizer(Tokenizer):
    """Byte-level subwords: each stands for exact bytes, so that a stream can be cut anywhere.

    A special token stands for no text. Special tokens that are written out in a text are read as such, as everywhere.

    Args:
        library: taken over; its truncation and padding are switched off.
        vocab_size: the model's, which may have room for more tokens than there are.
        start: begins a sequence, unless the tokenizer itself puts another token in front of texts.
        ends: tokens that end a generation.

    Raises:
        SubwordError: the tokens are not byte-level, do not fit ``vocab_size`` or cannot spell every text, or more than
            one token is put in front of a text.
    """

    unit = "token"

    def __init__(self, library: tokenizers.Tokenizer, vocab_size: int, start: int, ends: Iterable[int]) -> None:
        library.no_truncation()
        library.no_padding()
        self._library = library
        self.vocab_size = vocab_size
        self.ends = frozenset(ends)
        self._contents, self._special = _read_vocabulary(library, vocab_size)
        prefix = _prefix(library)
        self._starts_text = bool(prefix)
        self.start = prefix[0] if prefix else start
        beyond = [token for token in (self.start, *self.ends) if not 0 <= token < vocab_size]
        if beyond:
            raise SubwordError(f"the special token {beyond[0]} must be one of the model's, 0 to {vocab_size - 1}")

    @classmethod
    def read(cls, path: Path, vocab_size: int, start: int, ends: Iterable[int]) -> SubwordTokenizer:
        """The tokenizer of a ``tokenizer.json``. Raises ``SubwordError`` as the class does."""
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SubwordError(f"cannot read {path}: {error}") from error
        try:
            library = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more precise
            raise SubwordError(f"{path} is no tokenizer: {error}") from error
        try:
            return cls(library, vocab_size, start, ends)
        except SubwordError as error:
            raise SubwordError(f"{path}: {error}") from error

    def tokens(self, text: str) -> list[int]:
        """The tokens of ``text`` alone."""
        text.encode("utf-8")  # the library would raise another error
        # Unlike encode, this lets other threads run meanwhile, and keeps no offsets.
        ids: list[int] = self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def begin(self, tokens: Sequence[int], *, text: bool) -> list[int]:
        """``tokens``; after ``start`` if there are none, or where the tokenizer puts it in front of texts."""
        due = not tokens or (text and self._starts_text and tokens[0] != self.start)
        return [self.start, *tokens] if due else [*tokens]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a subword; none for a special token, or an id without one."""
        return self._contents[token]

    def token_name(self, token: int) -> str:
        """Its text, or ``bytes:\\xe2`` where that is no whole character, or the special token as it is written."""
        if self._contents[token]:
            return name_bytes(self._contents[token])
        return self._special.get(token, f"<|{token}|>")

    def token_text(self, token: int) -> str | None:
        """A special token as it is written; None for subwords, which a text does not always come apart into."""
        return self._special.get(token)


def _read_vocabulary(library: tokenizers.Tokenizer, vocab_size: int) -> tuple[list[bytes], dict[int, str]]:
    """The bytes of every id, none where it has no text; and how special tokens are written."""
    described = json.loads(library.to_str())
    decoders = _kinds(described["decoder"])
    if decoders != {_BYTE_LEVEL}:
        found = ", ".join(sorted(decoders)) or None
        raise SubwordError(f"only byte-level tokenizers are supported (decoder {_BYTE_LEVEL}), not {found}")
    if _BYTE_LEVEL not in _kinds(described["pre_tokenizer"]) | _kinds(described["normalizer"]):
        raise SubwordError(f"texts are not cut into bytes: no pre_tokenizer or normalizer is {_BYTE_LEVEL}")
    size = library.get_vocab_size()
    pieces = {token: piece for piece, token in library.get_vocab(with_added_tokens=False).items()}
    added = library.get_added_tokens_decoder()
    largest = max([*pieces, *added], default=-1)
    if largest >= vocab_size:
        raise SubwordError(f"it has {size} tokens up to id {largest}, the model {vocab_size}")
    contents = [b""] * vocab_size
    for token, piece in pieces.items():
        if token not in added:
            contents[token] = _spell(piece)
    special = {token: one.content for token, one in added.items() if one.special}
    for token, one in added.items():
        contents[token] = b"" if one.special else one.content.encode("utf-8")
    missing = {bytes([byte]) for byte in _UTF8} - {contents[token] for token in pieces}
    if missing:
        raise SubwordError(f"{len(missing)} bytes have no token of their own, so that not every text can be read")
    return contents, special


def _kinds(part: dict[str, Any] | None) -> set[str]:
    """The types of a component of a ``tokenizer.json``, those in a sequence one by one."""
    if part is None:
        return set()
    if part["type"] != "Sequence":
        return {part["type"]}
    inner = part.get("decoders") or part.get("pretokenizers") or part.get("normalizers") or []
    return set().union(*map(_kinds, inner))


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte, mapped to it: itself if it shows, else one from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _spell(piece: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in piece)
    except KeyError as error:
        raise SubwordError(f"the token {piece!r} is not byte-level: {error.args[0]!r} stands for no byte") from None


def _prefix(library: tokenizers.Tokenizer) -> list[int]:
    """The token, if any, that the tokenizer puts in front of every text."""
    plain: list[int] = library.encode(_PROBE, add_special_tokens=False).ids
    whole: list[int] = library.encode(_PROBE).ids
    count = len(whole) - len(plain)
    if count > 1 or whole[count:] != plain:
        raise SubwordError("its post_processor must add nothing to a text but one token in front")
    return whole[:count]
