"""Scores of tokens as OpenAI's objects."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from model.tokenizer import DOCUMENT
from service.api.schemas.chat import ChatLogprobs, TokenLogprob, TopLogprob
from service.api.schemas.completions import Logprobs
from service.engine.sequence import TokenScore


def token_text(token: int) -> str:
    """A token as a string of its own: ASCII as it is, a byte of a longer character as ``bytes:\\xe2``."""
    if token == DOCUMENT:
        return "<|document|>"
    return chr(token) if token < 0x80 else f"bytes:\\x{token:02x}"


class TextOffsets:
    """Where in a text its tokens stand, token by token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._complete = 0

    def place(self, token: int) -> int:
        """The index of the character that the next token is, or is a part of; the text's length for a separator."""
        if token != DOCUMENT:
            self._complete += len(self._decoder.decode(bytes([token])))
            pending, _ = self._decoder.getstate()
            if not pending:
                return self._complete - 1
        return self._complete


class LogprobsBuilder:
    """The log-probabilities of one choice of a completion, piece by piece.

    Args:
        separator: the prompt of token ids began with one; it has an entry, though nothing can score it.
    """

    def __init__(self, *, separator: bool) -> None:
        self._offsets = TextOffsets()
        self._separator = separator

    def add(self, scores: Iterable[TokenScore]) -> Logprobs:
        """The entries of the next tokens."""
        logprobs = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if self._separator:
            self._append(logprobs, DOCUMENT, None, None)
            self._separator = False
        for score in scores:
            top = {token_text(token): logprob for token, logprob in score.top}
            self._append(logprobs, score.token, score.logprob, top | {token_text(score.token): score.logprob})
        return logprobs

    def _append(self, logprobs: Logprobs, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        logprobs.tokens.append(token_text(token))
        logprobs.token_logprobs.append(logprob)
        logprobs.top_logprobs.append(top)
        logprobs.text_offset.append(self._offsets.place(token))


def chat_logprobs(scores: Iterable[TokenScore]) -> ChatLogprobs:
    """The entries of generated tokens."""

    def entry(token: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=token_text(token), logprob=logprob, bytes=[] if token == DOCUMENT else [token])

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **entry(score.token, score.logprob).model_dump(),
                top_logprobs=[entry(token, logprob) for token, logprob in score.top],
            )
            for score in scores
        ]
    )
