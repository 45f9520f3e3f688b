"""Resolution by region: which passages of a text keep theirs when compute must meet a target.

Source: section 4.4.2 of the source document, whose ``adapt_resolution`` lowers resolution "while preserving
high-density regions" where compute is over the target, and raises it where it is under. The sequence's own controller,
which works byte by byte, is :mod:`model.adaptive.controller`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from model.adaptive.density import smooth_density
from model.ops.tiling import Floats, Integers


def region_density(density: NDArray[np.floating], window_size: int) -> Floats:
    """Mean density of each run of ``window_size`` bytes of ``density`` [L], a short last run as it is smoothed."""
    smooth = smooth_density(torch.from_numpy(np.asarray(density, np.float64)).unsqueeze(0), window_size)[0]
    ends = np.append(np.arange(window_size, len(density), window_size), len(density)) - 1
    values: Floats = smooth.numpy()[ends]
    return values


def region_resolutions(density: Floats, costs: Floats, losses: Floats, target: float) -> Integers:
    """The resolution of each region, for a target compute.

    Every raise of one region by one level saves ``density * fall of losses`` for the rise of costs. The raises that
    save most for their cost are made first, until one does not fit: a lower target undoes them in reverse, so a denser
    region never has the lower resolution and lowers last. The outcome depends on the target alone, whatever the
    resolutions were before: from above and from below it is the same, and it cannot oscillate.

    Args:
        density: [R] mean bits per byte of regions of equal length. costs: [n] compute of one region by level, rising.
        losses: [n] share of density lost by level, falling, by less and less for the same compute.
        target: compute of all regions.

    Returns:
        Levels [R], 0 to n - 1. Their compute is at most ``target``, or the least there is.

    Raises:
        ValueError: costs do not rise, or losses are not convex and falling.
    """
    saved = -np.diff(losses) / np.diff(costs)
    if (np.diff(costs) <= 0.0).any() or (saved < 0.0).any() or (np.diff(saved) > 1e-12 * saved.max(initial=0.0)).any():
        raise ValueError(f"costs = {costs} must rise, and losses = {losses} fall ever less for the same compute")
    # By level within a region: what is equal must be raised in order. The sort is stable.
    worth = np.multiply.outer(saved, density)  # [n - 1, R]
    order = np.argsort(-worth, axis=None, kind="stable")
    level, region = np.unravel_index(order, worth.shape)
    spent = len(density) * costs[0] + np.cumsum(np.diff(costs)[level])
    made = int(np.searchsorted(spent, target * (1.0 + 1e-12), side="right"))
    return np.bincount(region[:made], minlength=len(density)).astype(np.int64)
