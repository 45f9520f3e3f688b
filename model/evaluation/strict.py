"""Protocol P0, strict: bits per byte and compute spent under online, causal firing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.adaptive.tiling import Pace, accrue
from model.lm import AdaptiveAttentionSystem, Encoded
from model.ops.tiling import Floats
from model.state import ModelState
from model.tokenizer import VOCAB_SIZE, ByteTokenizer, Tokenizer

PIECE = 4096
"""Bytes scored in one call; a multiple of every chunk size, and short enough to bound memory. Of larger vocabularies a
block is scored."""


@dataclass(slots=True)
class Score:
    """What one budget achieved; grows document by document."""

    budget: float
    """Share of full resolution that may be spent."""
    bits: float = 0.0
    bytes: int = 0
    fires: int = 0
    spent_flops: int = 0
    full_flops: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Mean cost of a byte."""
        return self.bits / self.bytes

    @property
    def flop_ratio(self) -> float:
        """Operations spent, as a share of full resolution."""
        return self.spent_flops / self.full_flops


class StrictEvaluation:
    """Scores documents at several budgets in one pass: the encoder and the density are shared between them.

    Every token is scored, the first one given the tokenizer's ``start``.

    Raises:
        ValueError: the model's vocabulary is not the tokenizer's.
    """

    def __init__(
        self, model: AdaptiveAttentionSystem, budgets: Iterable[float], tokenizer: Tokenizer | None = None
    ) -> None:
        self._tokenizer = tokenizer or ByteTokenizer()
        self._tokenizer.require_vocabulary(model.config.name, model.config.vocab_size)
        self._piece = PIECE if model.config.vocab_size <= VOCAB_SIZE else model.config.block_size
        self.model = model
        self.scores = [Score(budget) for budget in budgets]
        self._rates = [model.cost.rates(score.budget).decode for score in self.scores]

    @torch.inference_mode()
    def add(self, document: bytes, progress: Callable[[int], object] = lambda _: None) -> None:
        """Score every byte of a document given those before it; ``progress`` is called with bytes done.

        Bytes are those that the tokenizer gives back: one that normalises texts may keep fewer.

        Raises:
            ValueError: the document is no UTF-8, which subwords need.
        """
        ids = self._tokenizer.tokens_of_bytes(document)
        sizes = [len(self._tokenizer.token_bytes(token)) for token in ids]
        tokens = torch.tensor([[self._tokenizer.start, *ids]], device=self.model.device)
        shared = self.model.allocate_state(1)
        states = [self.model.allocate_state(1) for _ in self.scores]
        adaptive = any(self.model.cost.analysed(rate) for rate in self._rates)
        for start in range(0, len(ids), self._piece):
            targets = tokens[0, start + 1 : start + self._piece + 1]
            inputs = tokens[:, start : start + len(targets)]
            size = sum(sizes[start : start + self._piece])
            encoded = self.model.encode(inputs, shared.encoder)
            shared.encoder = encoded.states
            density = self._density(encoded, shared) if adaptive else None
            for score, rate, state in zip(self.scores, self._rates, states, strict=True):
                self._score(score, rate, state, encoded, density, targets)
                score.bytes += size
            progress(size)

    def _density(self, encoded: Encoded, state: ModelState) -> Floats:
        exit_logits = self.model.exit_head(encoded.hidden)
        before = state.density
        features, state.density = self.model.density(encoded.hidden, exit_logits, encoded.trace, before)
        density: Floats = self.model.density.smooth(self.model.density.combine(features), before, state.density)[0]
        return density

    def _score(
        self, score: Score, rate: float, state: ModelState, encoded: Encoded, density: Floats | None, targets: Tensor
    ) -> None:
        length = len(targets)
        fires = self._fires(rate, state, density, length)
        quota = accrue(state.router.quota, rate, length)
        output = self.model.combine(encoded.hidden, fires, state)
        state.router.quota = quota
        # In double precision: the sum over thousands of bytes has no fourth decimal in single.
        nats = F.cross_entropy(self.model.head(output)[0], targets, reduction="none").double().sum().item()
        fired = length if fires is None else int(fires.sum())
        cost = self.model.cost
        score.bits += nats / math.log(2.0)
        score.fires += fired
        score.spent_flops += cost.flops(length, fired, length, length if cost.analysed(rate) else 0).total
        score.full_flops += cost.full_flops(length, length)

    def _fires(self, rate: float, state: ModelState, density: Floats | None, length: int) -> Tensor | None:
        """Where the trunk runs in the next ``length`` bytes [1, L]; None for everywhere."""
        if rate >= 1.0:
            return None
        if rate <= 0.0:
            chosen = np.zeros(length, np.uint8)
        else:
            assert density is not None, "a rate between 0 and 1 needs the density"
            router = state.router
            position, last_fire, fires = (int(count) for count in (router.positions, router.last_fire, router.fires))
            chosen = self.model.tiles.online(density, rate, Pace(position, last_fire, fires, router.quota.item()))
        return torch.from_numpy(chosen.astype(bool)).to(self.model.device).unsqueeze(0)
