"""A compiled loop that draws tokens: of a vocabulary of bytes, a call of a tensor library takes longer than the work.

Source: top-p is nucleus sampling (Holtzman et al. 2020).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from model.ops.tiling import Floats, Integers


@njit(cache=True, nogil=True, error_model="numpy")
def draw_rows(
    logits: NDArray[np.float32],
    temperature: Floats,
    top_k: Integers,
    min_p: Floats,
    top_p: Floats,
    uniform: Floats,
) -> Integers:  # pragma: no cover - compiled
    """One token per row [n], drawn by inversion: the same one for the same row and number, whoever stands beside it.

    Args:
        logits: [n, V], finite. temperature: [n] above 0.
        top_k: [n] how many of the most probable tokens are left; at equal probability the first ones.
        min_p: [n] share of the best one's probability that those have which are left.
        top_p: [n] share of what is left by then that the smallest set holds from which is drawn, above 0; 1 for all.
        uniform: [n] numbers in [0, 1).
    """
    count, size = logits.shape
    tokens = np.empty(count, np.int64)
    share = np.empty(size)
    for i in range(count):
        best = float(logits[i].max())
        total = 0.0
        for v in range(size):
            share[v] = math.exp((float(logits[i, v]) - best) / temperature[i])
            total += share[v]
        if top_k[i] >= size and min_p[i] <= 0.0 and top_p[i] >= 1.0:
            tokens[i] = _reach(share, np.arange(size), size, uniform[i] * total)
            continue
        order = np.argsort(-share, kind="mergesort")  # stable
        left, total = 0, 0.0
        while left < min(top_k[i], size) and share[order[left]] >= min_p[i] * share[order[0]]:
            total += share[order[left]]
            left += 1
        kept, mass = 0, 0.0
        while kept < left and mass < top_p[i] * total:
            mass += share[order[kept]]
            kept += 1
        tokens[i] = _reach(share, order, kept, uniform[i] * mass)
    return tokens


@njit(cache=True, nogil=True)
def _reach(share: Floats, order: Integers, count: int, wanted: float) -> np.int64:  # pragma: no cover - compiled
    """The first of ``count`` tokens in ``order`` up to which the shares add up to more than ``wanted``.

    Rounding must not reach past the last one, nor take one without a share.
    """
    found, total = np.int64(order[0]), 0.0
    for k in range(count):
        if share[order[k]] > 0.0:
            found = np.int64(order[k])
            total += share[order[k]]
            if total > wanted:
                break
    return found
