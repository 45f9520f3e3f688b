"""The compute that a text is expected to take at one threshold for all texts, differentiable in the density."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.ops.tiling import smooth_rows, smooth_rows_gradient


class _Smooth(torch.autograd.Function):
    """The causal average of whole texts [B, L] that decides where the trunk runs, in float64."""

    @staticmethod
    def forward(ctx: Any, density: Tensor, window: int) -> Tensor:
        ctx.window, ctx.target = window, density
        batch = len(density)
        values = np.ascontiguousarray(density.detach().double().cpu().numpy())
        return torch.from_numpy(smooth_rows(values, np.zeros(batch), np.zeros(batch, np.int64), window)).to(
            density.device
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        gradient = np.ascontiguousarray(gradients[0].double().cpu().numpy())
        return torch.from_numpy(smooth_rows_gradient(gradient, ctx.window)).to(ctx.target), None


def expected_rates(density: Tensor, rate: float, window: int, spread: float) -> Tensor:
    """Expected fires per byte [B] (float64) of texts, all at the threshold where their mean is ``rate``.

    A byte fires with the probability ``sigmoid((log smoothed density - log threshold) / spread)``: the firing rule
    without staleness, inertia and pacing, which even out what this shows. The threshold carries no gradient: the mean
    over texts is ``rate`` by construction, what each text is away from it is not.

    Args:
        density: [B, L] bits of whole texts, above 0. rate: between 0 and 1. window: bytes of the smoothing.
        spread: of the log density.
    """
    logged = _Smooth.apply(density, window).log()  # type: ignore[no-untyped-call]
    known = logged.detach()
    low, high = known.min() - 40.0 * spread, known.max() + 40.0 * spread
    for _ in range(40):
        middle = 0.5 * (low + high)
        too_low = ((known - middle) / spread).sigmoid().mean() > rate
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    rates: Tensor = ((logged - 0.5 * (low + high)) / spread).sigmoid().mean(1)
    return rates
