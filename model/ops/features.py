"""A compiled loop over the rows of a decoding batch: the density features of one byte per sequence.

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


@njit(cache=True, fastmath={"reassoc", "contract"})
def _squared_distance(one: Singles, other: Singles) -> float:  # pragma: no cover - compiled
    """Sum of squared differences of two flat arrays."""
    total = np.float32(0.0)
    for index in range(one.shape[0]):
        difference = one[index] - other[index]
        total += difference * difference
    return float(total)


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


@njit(cache=True)
def features_rows(
    rows: Integers,
    logits: Singles,
    query: Singles,
    key: Singles,
    dt: Singles,
    decay_rate: Singles,
    before: Singles,
    after: Singles,
    keys: Singles,
    weights: Singles,
    log_decay: Singles,
    mass: Singles,
    seen: Integers,
) -> Floats:  # pragma: no cover - compiled
    """The analyzer's features [n, 4] for some rows of a batch; their state is advanced in place.

    Args:
        rows: [n] which rows. logits: [n, V] of the early exit, for those rows. query, key: [B, N]. dt: [B, H].
        decay_rate: [H], the A of the recurrence. before, after: [B, H * P * N] the encoder's state.
        keys: [B, W, N]. weights, log_decay: [B, W, H]. mass: [B, H]. seen: [B]. These five are the analyzer's state.
    """
    features = np.empty((rows.shape[0], 4))
    for i in range(rows.shape[0]):
        b = rows[i]
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
            log_decay[b, -1, h] = dt[b, h] * decay_rate[h]
            mass[b, h] = mass[b, h] * math.exp(log_decay[b, -1, h]) + dt[b, h] * length
        seen[b] += 1
        entropy, distance = _look_back(query[b], keys[b], weights[b], log_decay[b], mass[b], seen[b])
        features[i, 0] = math.log1p(math.sqrt(_squared_distance(after[b], before[b])))
        features[i, 1] = entropy
        features[i, 2] = distance
        features[i, 3] = _predictive_entropy(logits[i])
    return features
