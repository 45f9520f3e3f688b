"""A compiled loop over the rows of a decoding batch: the density of one byte per sequence.

A step of the model on a CPU takes a few milliseconds, and a hundred tiny tensor operations would be a third of it. The
plain twin is ``InformationDensityAnalyzer.step``; it serves other devices, and the tests.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from model.ops.tiling import Floats, Integers

Singles = NDArray[np.float32]

_TINY = 1e-20


@njit(cache=True)
def _softplus(value: float) -> float:  # pragma: no cover - compiled
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


@njit(cache=True)
def _entropy_term(share: float) -> float:  # pragma: no cover - compiled
    return -share * math.log(share) if share > 0.0 else 0.0


@njit(cache=True)
def _predictive_entropy(logits: Singles) -> float:  # pragma: no cover - compiled
    """Entropy in bits of the distribution of logits [V]."""
    top = logits.max()
    total = 0.0
    weighted = 0.0
    for value in logits:
        score = float(value - top)
        mass = math.exp(score)
        total += mass
        weighted += mass * score
    return (math.log(total) - weighted / total) / math.log(2.0)


@njit(cache=True)
def _look_back(
    query: Singles, keys: Singles, weights: Singles, log_decay: Singles, mass: Singles, seen: int
) -> tuple[float, float]:  # pragma: no cover - compiled
    """Entropy and look-back distance of one row of the hidden attention, as in the density analyzer.

    Args:
        query: [N]. keys: [W, N], oldest first. weights, log_decay: [W, H]. mass: [H]. seen: positions so far.
    """
    window, heads = weights.shape
    match = np.empty(window)
    norm = np.empty(window)
    length = 0.0
    for n in range(query.shape[0]):
        length += query[n] * query[n]
    length = math.sqrt(length)
    for j in range(window):
        dot = 0.0
        square = 0.0
        for n in range(query.shape[0]):
            dot += query[n] * keys[j, n]
            square += keys[j, n] * keys[j, n]
        match[j] = abs(dot)
        norm[j] = math.sqrt(square)
    entropy = 0.0
    distance = 0.0
    scores = np.empty(window)
    for h in range(heads):
        near = 0.0
        total = 0.0
        decay = 0.0
        for j in range(window - 1, -1, -1):
            reach = weights[j, h] * math.exp(decay)
            decay += log_decay[j, h]
            scores[j] = match[j] * reach
            total += scores[j]
            near += norm[j] * reach
        past = max(mass[h] - near, 0.0) * length
        total += past + _TINY
        lump = past / total
        entropy += _entropy_term(lump)
        distance += lump * window
        for j in range(window):
            share = scores[j] / total
            entropy += _entropy_term(share)
            distance += share * (window - 1 - j)
    rows = min(seen, window) + 1.0
    return entropy / heads / math.log(rows), distance / heads / window


@njit(cache=True, fastmath={"reassoc", "nsz", "contract"})
def _learned(
    hidden: Singles, standard: Singles, inner: Singles, inner_bias: Singles, outer: Singles, eps: float
) -> float:  # pragma: no cover - compiled
    """The learned feature of one row: a layer of SiLU units over its normalised output and the other features."""
    width = hidden.shape[0]
    square = np.float32(0.0)
    for d in range(width):
        square += hidden[d] * hidden[d]
    scale = np.float32(1.0) / np.float32(math.sqrt(square / width + eps))
    total = 0.0
    for unit in range(outer.shape[0]):
        weights = inner[unit]
        dot = np.float32(0.0)
        for d in range(width):
            dot += hidden[d] * weights[d]
        dot = dot * scale + inner_bias[unit]
        for k in range(standard.shape[0]):
            dot += standard[k] * weights[width + k]
        total += outer[unit] * dot / (1.0 + math.exp(-dot))
    return total


@njit(cache=True)
def density_rows(
    rows: Integers,
    hidden: Singles,
    logits: Singles,
    key: Singles,
    query: Singles,
    dt: Singles,
    steps_log_decay: Singles,
    change: Floats,
    keys: Singles,
    weights: Singles,
    log_decay: Singles,
    mass: Singles,
    seen: Integers,
    level: Floats,
    mean: Singles,
    std: Singles,
    raw_weight: Singles,
    bias: Singles,
    inner: Singles,
    inner_bias: Singles,
    outer: Singles,
    eps: float,
    window_size: int,
) -> Floats:  # pragma: no cover - compiled
    """Smoothed density [n] in bits for some rows of a batch; their state is advanced in place.

    Args:
        rows: [n] which rows. hidden: [n, D] and logits: [n, V] of the early exit, for those rows.
        key, query, dt, steps_log_decay, change: the trace of the encoder's last block, of all B rows. With a window of
            no keys nothing is measured, and neither they nor the logits are read.
        keys: [B, W, N]. weights, log_decay: [B, W, H]. mass: [B, H]. seen, level: [B]. The analyzer's state.
        mean, std, raw_weight: [4]. bias: []. inner: [h, D + 4]. inner_bias, outer: [h]. The analyzer's weights.
        eps: of the norm of ``hidden``. window_size: bytes that the level averages over.
    """
    density = np.empty(rows.shape[0])
    features, standard = np.zeros(4), np.empty(4, np.float32)
    for i in range(rows.shape[0]):
        b = rows[i]
        seen[b] += 1
        if keys.shape[1]:
            square = 0.0
            for n in range(key.shape[1]):
                square += key[b, n] * key[b, n]
            length = math.sqrt(square)
            keys[b, :-1] = keys[b, 1:]
            weights[b, :-1] = weights[b, 1:]
            log_decay[b, :-1] = log_decay[b, 1:]
            keys[b, -1] = key[b]
            weights[b, -1] = dt[b]
            for h in range(dt.shape[1]):
                log_decay[b, -1, h] = steps_log_decay[b, h]
                mass[b, h] = mass[b, h] * math.exp(log_decay[b, -1, h]) + dt[b, h] * length
            entropy, distance = _look_back(query[b], keys[b], weights[b], log_decay[b], mass[b], seen[b])
            features[0] = math.log1p(math.sqrt(change[b]))
            features[1] = entropy
            features[2] = distance
            features[3] = _predictive_entropy(logits[i])
        total = float(bias[()])
        for k in range(4):
            standard[k] = (features[k] - mean[k]) / std[k]
            total += standard[k] * _softplus(raw_weight[k])
        total += _learned(hidden[i], standard, inner, inner_bias, outer, eps)
        level[b] += (_softplus(total) + 1e-6 - level[b]) / min(seen[b], window_size)
        density[i] = level[b]
    return density
