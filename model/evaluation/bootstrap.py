"""Paired bootstrap over documents.

Source: Efron and Tibshirani 1993, chapters 6 and 13. Documents are drawn with replacement, the same ones for all
columns, so that differences between columns keep their pairing. Bits per byte of a sample are all its bits over all its
bytes: long documents count as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from model.ops.tiling import Floats, Integers

RESAMPLES = 10_000
SEED = 20_261
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, and its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float] | None:
        """Both ends, None where there is none."""
        return [self.low, self.high] if math.isfinite(self.low) and math.isfinite(self.high) else None

    def as_dict(self) -> dict[str, float | list[float] | None]:
        """For JSON, which has no NaN."""
        return {"value": self.value if math.isfinite(self.value) else None, "interval": self.interval}

    def plus(self, shift: float) -> Estimate:
        """The estimate of a statistic that is larger by ``shift``."""
        return Estimate(self.value + shift, self.low + shift, self.high + shift)


NOTHING = Estimate(math.nan, math.nan, math.nan)
"""Of what cannot be told."""


class Bootstrap:
    """Bits per byte of K columns over n documents, and over resamples of them.

    Args:
        bits: [n, K]. sizes: [n] bytes of each document. resamples: how often documents are drawn. seed: of the draws.

    Raises:
        ValueError: there is no document.
    """

    def __init__(self, bits: Floats, sizes: Integers, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        count = len(sizes)
        if not count:
            raise ValueError("a bootstrap needs at least one document")
        self.documents = count
        self.columns: Floats = bits.sum(0, keepdims=True) / sizes.sum()
        """[1, K] bits per byte of all documents."""
        random = np.random.default_rng(seed)
        parts = []
        for start in range(0, resamples, _AT_ONCE):
            drawn = random.multinomial(count, np.full(count, 1.0 / count), size=min(_AT_ONCE, resamples - start))
            parts.append((drawn @ bits) / (drawn @ sizes)[:, None])
        self.samples: Floats = np.concatenate(parts)
        """[resamples, K] bits per byte of each resample."""

    def estimate(self, statistic: Callable[[Floats], Floats]) -> Estimate:
        """A statistic, a function of bits per byte [R, K] to [R], with its percentile interval.

        One document has no interval: nothing is known of how documents differ.
        """
        value = float(statistic(self.columns)[0])
        if self.documents < 2:
            return Estimate(value, math.nan, math.nan)
        low, high = np.percentile(statistic(self.samples), [2.5, 97.5])
        return Estimate(value, float(low), float(high))
