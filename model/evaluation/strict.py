"""Protocol P0, strict: bits per byte and compute spent under online, causal firing, document by document."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from model.evaluation.arms import ADAPTIVE, Text, make_arms
from model.evaluation.passages import Cutter, Passage, Protocol, read_features
from model.evaluation.scoring import Tally, full_flops, score
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Floats
from model.tokenizer import ByteTokenizer, Tokenizer


@dataclass(slots=True)
class Score(Tally):
    """What one budget achieved; grows document by document."""

    budget: float = 1.0
    """Share of full resolution that may be spent."""
    bytes: int = 0
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
    """Scores documents at several budgets by the shipped rule: the encoder and the density are shared between them.

    Every token is scored, the first one given the tokenizer's ``start``.

    Raises:
        ValueError: the model's vocabulary is not the tokenizer's.
    """

    def __init__(
        self, model: AdaptiveAttentionSystem, budgets: Iterable[float], tokenizer: Tokenizer | None = None
    ) -> None:
        tokenizer = tokenizer or ByteTokenizer()
        tokenizer.require_vocabulary(model.config.name, model.config.vocab_size)
        self.model = model
        self.scores = [Score(budget=budget) for budget in budgets]
        self._rates = [model.cost.rates(score.budget) for score in self.scores]
        self._cutter = Cutter(Protocol.STRICT, tokenizer, model.config.block_size, model.device)
        self._arms = {
            rates.depth: make_arms(model, [ADAPTIVE], Protocol.STRICT, None, rates.depth)[0] for rates in self._rates
        }

    def add(self, document: bytes, progress: Callable[[int], object] = lambda _: None) -> None:
        """Score every byte of a document given those before it; ``progress`` is called with bytes done.

        Bytes are those that the tokenizer gives back: one that normalises texts may keep fewer.

        Raises:
            ValueError: the document is no UTF-8, which subwords need.
        """
        cost = self.model.cost
        for passage in self._cutter.cut(document):
            signals = {depth: self._signal(passage, depth) for depth in self._arms}
            placements = [self._arms[rates.depth].place(passage, signals[rates.depth], rates) for rates in self._rates]
            depths = [rates.depth for rates in self._rates]
            bits = score(self.model, passage, placements, depths, progress)
            for tally, rates, fires, needed in zip(self.scores, self._rates, placements, bits, strict=True):
                tally.add(cost, passage, fires, float(needed), rates.depth, analysed=cost.analysed(rates.decode))
                tally.bytes += passage.bytes
                tally.full_flops += full_flops(cost, passage)

    def _signal(self, passage: Passage, depth: int | None) -> Floats:
        """What places are chosen by at a depth; where no budget leaves a choice, nothing."""
        if not any(self.model.cost.analysed(rates.decode) for rates in self._rates if rates.depth == depth):
            return np.zeros(len(passage))
        return self._arms[depth].signal(Text(passage, read_features(self.model, passage.inputs, depth)[0]))
