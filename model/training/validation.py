"""Bits per byte of validation text along the dial."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Floats
from model.training.firing import Reduced, choose_fires
from model.training.loss import cross_entropy

SHARES = {
    "full": Fraction(1),
    "three_quarters": Fraction(3, 4),
    "half": Fraction(1, 2),
    "quarter": Fraction(1, 4),
    "floor": Fraction(0),
}
"""Of the trunk's blocks, how many run per byte, by name."""

SCORES = ("full", "shallow", *list(SHARES)[1:])
"""What is scored: those, and smaller depths with the trunk run everywhere, weighed as in training; of a model that has
them."""

ROWS = 4
"""Sequences that are run together: it bounds the memory."""


@torch.no_grad()
def validate(model: AdaptiveAttentionSystem, tokens: Tensor, *, plain: bool = False) -> dict[str, float]:
    """Bits per byte over tokens [B, L + 1] at each of ``SCORES``, at full resolution only if ``plain``.

    Between the ends the trunk fires by the causal rule, as in training: at one threshold per rate, fitted to these
    texts. What all of it takes is about three passes at full resolution. The model is left in training mode.
    """
    model.eval()
    shallow = model.config.shallow_depths
    scores = {"full": float(bits_at(model, tokens, np.empty(0), None, [1.0]).mean())}
    if not plain:
        for depth, part in zip(shallow, model.config.shallow_shares, strict=True):
            everywhere = bits_at(model, tokens, np.empty(0), depth, [1.0]).mean()
            scores["shallow"] = scores.get("shallow", 0.0) + part * float(everywhere)
        at = {name: model.cost.at_share(share) for name, share in SHARES.items() if share < 1.0}
        stages: tuple[int | None, ...] = (*shallow, None)
        for stage in stages:
            placed = {name: rate for name, (depth, rate) in at.items() if depth == stage}
            if placed:
                densities = analyse(model, tokens[:, :-1], stage)
                bits = bits_at(model, tokens, densities, stage, placed.values()).mean(axis=1)
                scores |= zip(placed, bits.tolist(), strict=True)
    model.train()
    return scores


def analyse(model: AdaptiveAttentionSystem, inputs: Tensor, depth: int | None = None) -> Floats:
    """Smoothed density [B, L] in bits of inputs [B, L], of the stage that ends after ``depth`` blocks."""
    return np.concatenate([model.analyse(rows, depth).numpy() for rows in inputs.split(ROWS)])


def bits_at(
    model: AdaptiveAttentionSystem, tokens: Tensor, densities: Floats, depth: int | None, rates: Iterable[float]
) -> Floats:
    """Bits per byte [R, B] of tokens [B, L + 1] at each of R rates of the stage that ends after ``depth`` blocks.

    ``densities`` [B, L] say where it runs between the ends; those below it run everywhere.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    placements: list[tuple[float, Tensor | None]] = []
    for rate in rates:
        reduced = Reduced(rate, uniform=False, d_state=None, momentum=0.0)
        fires = None if rate >= 1.0 else torch.from_numpy(choose_fires(model.placement(depth)[1], densities, reduced))
        placements.append((rate, None if fires is None else fires.to(tokens.device)))
    bits = np.empty((len(placements), len(tokens)))
    for start in range(0, len(tokens), ROWS):
        rows = slice(start, start + ROWS)
        count = len(inputs[rows])
        encoded = model.encode(inputs[rows], model.allocate_state(count).encoder)
        for number, (rate, fires) in enumerate(placements):
            state = model.allocate_state(count, depth=depth)
            taken = None if fires is None else fires[rows]
            output = model.combine(encoded.hidden, taken, state, propagate=rate > 0.0)
            nats = cross_entropy(model.head(output), targets[rows]).double().mean(1)
            bits[number, rows] = nats.cpu().numpy() / math.log(2.0)
    return bits
