"""Protocols: which bytes of a document are planned, which are scored, and what of a text every arm shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Booleans, Integers
from model.tokenizer import VOCAB_SIZE, Tokenizer

PIECE = 4096
"""Bytes read in one call; a multiple of every chunk size, and short enough to bound memory. Of larger vocabularies a
block is read."""

PROMPT = 1024
"""Tokens of a prompt in P1, rounded down to whole blocks."""

CONTINUATION = 512
"""Tokens scored after each prompt in P1."""

FUTURE_CHARGE = 0.04
"""Bits per byte that the plan of a 512-byte block can carry of the bytes that it places; P2 is charged for them."""


class Protocol(StrEnum):
    """How a document is placed and scored."""

    STRICT = "P0"
    """Every byte scored, every place chosen causally: what generating and scoring do."""
    SERVING = "P1"
    """Prompts planned block by block, their continuations placed causally and scored."""
    ORACLE = "P2"
    """Every byte planned block by block and scored. A plan sees its block, the bytes to come included: an upper bound
    on what placement can give, charged ``FUTURE_CHARGE``."""


@dataclass(frozen=True, slots=True)
class Passage:
    """L positions read as one sequence from its start."""

    order: int
    """Number among the passages of its domain."""
    offset: int
    """Positions of its domain before it."""
    inputs: Tensor
    """[1, L] tokens read."""
    targets: Tensor
    """[L] the token after each."""
    sizes: Integers
    """[L] bytes of each target."""
    spaces: Booleans
    """[L] whether the token read holds whitespace."""
    planned: int
    """Positions from the start whose places are planned in blocks; those after them are placed causally."""
    scored: int
    """The first position whose prediction is scored; all after it are too."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def logits(self) -> int:
        """Predictions scored."""
        return len(self) - self.scored

    @property
    def bytes(self) -> int:
        """Bytes scored."""
        return int(self.sizes[self.scored :].sum())


@dataclass(frozen=True, slots=True)
class Calibration:
    """Texts that thresholds are fitted to."""

    tokens: Tensor
    """[B, L]."""
    spaces: Booleans
    """[B, L], as those of a passage."""


class Cutter:
    """Cuts the documents of one domain, in order, into the passages of a protocol.

    P0 and P2 read a document as one passage. P1 cuts it into windows that do not overlap, each a request of its own: a
    prompt of ``PROMPT`` tokens, the tokenizer's start included, so that it is read in whole blocks, and the
    ``CONTINUATION`` tokens after it. Every window is scored on as many bytes after as long a prompt, so that none
    weighs more, and windows of one document stay together in the bootstrap. What is left of a document is not read.
    """

    def __init__(self, protocol: Protocol, tokenizer: Tokenizer, block_size: int, device: torch.device) -> None:
        self._protocol = protocol
        self._tokenizer = tokenizer
        self._prompt = max(PROMPT // block_size, 1) * block_size
        self._device = device
        self._order = 0
        self._offset = 0

    def cut(self, document: bytes) -> list[Passage]:
        """The passages of the next document, none where it is too short for the protocol.

        Raises:
            ValueError: the document is no UTF-8, which subwords need.
        """
        ids = self._tokenizer.tokens_of_bytes(document)
        if self._protocol is not Protocol.SERVING:
            return [self._passage(ids, len(ids) if self._protocol is Protocol.ORACLE else 0, 0)] if ids else []
        length = self._prompt + CONTINUATION - 1  # the start is no target, the last target is not read
        ends = range(length, len(ids) + 1, length)
        return [self._passage(ids[end - length : end], self._prompt, self._prompt - 1) for end in ends]

    def _passage(self, ids: Sequence[int], planned: int, scored: int) -> Passage:
        read = [self._tokenizer.start, *ids]
        tokens = torch.tensor([read], device=self._device)
        passage = Passage(
            order=self._order,
            offset=self._offset,
            inputs=tokens[:, :-1],
            targets=tokens[0, 1:],
            sizes=np.array([len(self._tokenizer.token_bytes(token)) for token in ids], np.int64),
            spaces=find_spaces(self._tokenizer, read[:-1]),
            planned=planned,
            scored=scored,
        )
        self._order += 1
        self._offset += len(ids)
        return passage


def find_spaces(tokenizer: Tokenizer, ids: Sequence[int]) -> Booleans:
    """Which of the tokens [L] hold whitespace, or stand for no text, as those between documents."""
    texts = (tokenizer.token_bytes(token) for token in ids)
    return np.array([not text or any(byte in b" \t\n\r\f\v" for byte in text) for text in texts], np.bool_)


def piece_length(model: AdaptiveAttentionSystem) -> int:
    """Tokens read in one call."""
    return PIECE if model.config.vocab_size <= VOCAB_SIZE else model.config.block_size


@torch.inference_mode()
def read_features(model: AdaptiveAttentionSystem, inputs: Tensor, depth: int | None = None) -> Tensor:
    """Raw density features [B, L, F] of sequences [B, L], as serving computes them, on the CPU.

    They are those of the stage that ends after ``depth`` blocks of the trunk; None for the last.
    """
    state = model.allocate_state(len(inputs), depth=depth)
    parts = []
    for tokens in inputs.split(piece_length(model), dim=1):
        encoded = model.encode(tokens, state.encoder)
        state.encoder = encoded.states
        entrance = model.enter(encoded.hidden, state)[-1]
        features, state.density = model.features(encoded, state.density, entrance)
        parts.append(features.cpu())
    return torch.cat(parts, 1)
