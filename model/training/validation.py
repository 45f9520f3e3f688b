"""Bits per byte of validation text along the dial."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.lm import AdaptiveAttentionSystem
from model.training.firing import Reduced, choose_fires
from model.training.loss import cross_entropy

RATES = {"full": 1.0, "three_quarters": 0.75, "half": 0.5, "quarter": 0.25, "floor": 0.0}
"""Trunk fires per byte by name."""

ROWS = 4
"""Sequences that are run together: it bounds the memory."""


@torch.no_grad()
def validate(model: AdaptiveAttentionSystem, tokens: Tensor, *, plain: bool = False) -> dict[str, float]:
    """Bits per byte over tokens [B, L + 1] at each of ``RATES``, at full resolution only if ``plain``.

    Between the ends the trunk fires by the causal rule, as in training: at one threshold per rate, fitted to these
    texts. What all of it takes is about three passes at full resolution. The model is left in training mode.
    """
    model.eval()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    fires = {"full": None} if plain else _fires(model, inputs)
    sums = dict.fromkeys(fires, 0.0)
    for start in range(0, len(tokens), ROWS):
        rows = slice(start, start + ROWS)
        encoded = model.encode(inputs[rows], model.allocate_state(len(inputs[rows])).encoder)
        for name, chosen in fires.items():
            state = model.allocate_state(len(inputs[rows]))
            taken = None if chosen is None else chosen[rows]
            output = model.combine(encoded.hidden, taken, state, propagate=RATES[name] > 0.0)
            sums[name] += cross_entropy(model.head(output), targets[rows]).double().sum().item()
    model.train()
    return {name: total / (targets.numel() * math.log(2.0)) for name, total in sums.items()}


def _fires(model: AdaptiveAttentionSystem, inputs: Tensor) -> dict[str, Tensor | None]:
    """Where the trunk fires at each rate: [B, L] bool, or None for everywhere."""
    density = torch.cat([model.analyse(rows) for rows in inputs.split(ROWS)]).numpy()
    fires: dict[str, Tensor | None] = {}
    for name, rate in RATES.items():
        reduced = Reduced(rate, uniform=False, d_state=None, momentum=0.0)
        chosen = None if rate >= 1.0 else choose_fires(model.tiles, density, reduced)
        fires[name] = None if chosen is None else torch.from_numpy(chosen).to(inputs.device)
    return fires
