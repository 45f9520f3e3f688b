"""Keeps the compute spent on a sequence at its budget, by correcting how willingly the trunk fires.

Source: ``adapt_resolution``, section 4.4.2 of the source document. There a loop halves or doubles a resolution; here
the error between fires and quota bends the threshold smoothly, inside the sequence, at every byte.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.ops.tiling import FARTHEST
from model.state import RouterState


def quota_error(fires: Tensor, quota: Tensor, positions: Tensor, rates: Tensor) -> Tensor:
    """Fires ahead (positive) or behind (negative) of the quota, in units of the tolerated gap.

    The gap is 6 fires, or 1 % of the bytes and 2 % of the fires due where that is more: enough room for stretches of
    fires, little enough to be within a few percent of the budget after 2,048 bytes. The compiled twin is
    :func:`model.ops.tiling.pacing_error`.
    """
    return (fires - quota) / ((0.01 + 0.02 * rates) * positions).clamp_min(6.0)


def adapt_resolution(log_threshold: Tensor, error: Tensor, spread: Tensor, inertia: float, running: Tensor) -> Tensor:
    """The corrected log threshold [B]: gentle near the quota, steep one tolerated gap away from it, then a wall.

    Args:
        log_threshold: [B]. error: [B] of the quota. spread: of the log density over text, the unit of the correction.
        inertia: in spreads, how much more easily a stretch of fires goes on than it begins.
        running: [B] bool, the byte before fired.
    """
    corrected = log_threshold + spread * (error + 4.0 * error**3 + torch.where(running, -inertia, inertia))
    return torch.where(error.abs() < FARTHEST, corrected, error * math.inf)


def fire_step(
    density: Tensor,
    rates: Tensor,
    log_threshold: Tensor,
    spread: Tensor,
    inertia: float,
    tau: float,
    state: RouterState,
    sizes: tuple[int, int],
) -> Tensor:
    """Which sequences fire at this byte; the batched twin of :func:`model.ops.tiling.fire_online`.

    Args:
        density: [B] bits. rates: [B] float64 in [0, 1]. log_threshold: [B] float64, calibrated for the rates.
        spread: of the log density over text. inertia: in spreads. tau: staleness constant in bytes.
        state: before this byte, not changed. sizes: least and most bytes per tile.

    Returns:
        [B] bool.
    """
    least, most = sizes
    position = state.positions + 1
    never = state.last_fire == 0
    age = torch.where(never, most, position - state.last_fire)
    error = quota_error(state.fires.double(), state.quota + rates, position, rates)
    threshold = adapt_resolution(log_threshold, error, spread, inertia, age == 1).clamp_max(700.0).exp()
    staleness = -torch.expm1(-age.clamp_max(most).double() / tau)
    wants = (density.double() * staleness >= threshold) | ((age >= most) & (error < 1.0))
    return ((wants & (age >= least)) | (rates >= 1.0)) & (rates > 0.0)


def advance(state: RouterState, fired: Tensor, rates: Tensor) -> None:
    """Account for one byte [B] in place: position, quota, and the fires."""
    state.positions += 1
    state.quota += rates
    state.fires += fired
    state.last_fire[:] = torch.where(fired, state.positions, state.last_fire)
