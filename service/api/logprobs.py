"""Scores of tokens as OpenAI's objects."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from model.tokenizer import Tokenizer
from service.api.schemas.chat import ChatLogprobs, TokenLogprob, TopLogprob
from service.api.schemas.completions import Logprobs
from service.engine.sequence import TokenScore


class TextOffsets:
    """Where in a text its tokens stand, token by token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._complete = 0

    def place(self, content: bytes) -> int:
        """The index of the character that the next token's ``content`` begins with or in; the text's length if none."""
        if not content:
            return self._complete
        self._complete += len(self._decoder.decode(content[:1]))
        pending, _ = self._decoder.getstate()
        offset = self._complete if pending else self._complete - 1
        self._complete += len(self._decoder.decode(content[1:]))
        return offset


class LogprobsBuilder:
    """The log-probabilities of one choice of a completion, piece by piece.

    Args:
        first: the token that the listed ones begin with, where nothing can score it; None where the first is scored.
    """

    def __init__(self, tokenizer: Tokenizer, first: int | None) -> None:
        self._tokenizer = tokenizer
        self._offsets = TextOffsets()
        self._first = first

    def add(self, scores: Iterable[TokenScore]) -> Logprobs:
        """The entries of the next tokens."""
        logprobs = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if self._first is not None:
            self._append(logprobs, self._first, None, None)
            self._first = None
        name = self._tokenizer.token_name
        for score in scores:
            top = {name(token): logprob for token, logprob in score.top}
            self._append(logprobs, score.token, score.logprob, top | {name(score.token): score.logprob})
        return logprobs

    def _append(self, logprobs: Logprobs, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        logprobs.tokens.append(self._tokenizer.token_name(token))
        logprobs.token_logprobs.append(logprob)
        logprobs.top_logprobs.append(top)
        logprobs.text_offset.append(self._offsets.place(self._tokenizer.token_bytes(token)))


def chat_logprobs(scores: Iterable[TokenScore], tokenizer: Tokenizer) -> ChatLogprobs:
    """The entries of generated tokens."""

    def entry(token: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=tokenizer.token_name(token), logprob=logprob, bytes=list(tokenizer.token_bytes(token)))

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **entry(score.token, score.logprob).model_dump(),
                top_logprobs=[entry(token, logprob) for token, logprob in score.top],
            )
            for score in scores
        ]
    )
