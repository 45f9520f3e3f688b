"""Compiled loops over bytes: the tiling dynamic programme and the online firing rule.

Both walk a sequence byte by byte with a tiny amount of work at each, which is what numba is for. They take numpy
arrays and know nothing of torch. A function and the compiled functions that it calls stand in one file: numba's cache
does not notice a change in another.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

FARTHEST = 1.25
"""Gaps from the quota beyond which every byte fires, or none, whatever the text."""


def staleness_table(tau: float, size: int) -> Floats:
    """``1 - exp(-age / tau)`` for age 0..size: the share of a byte's density lost to a trunk that is ``age`` old."""
    table: Floats = -np.expm1(-np.arange(size + 1, dtype=np.float64) / tau)
    return table


@njit(cache=True, fastmath={"nnan", "nsz", "contract"})
def plan_block(
    density: Floats, staleness: Floats, price: float, entry: float, carry: int, min_size: int, max_size: int
) -> tuple[Bytes, int, float]:  # pragma: no cover - compiled
    """The cheapest tiling of one block, exactly, by dynamic programming over tile ends.

    Minimises ``sum of density * staleness(age) over bytes that do not fire + price * tiles + entry * tiles of more than
    one byte``: after a gap the trunk is worth little for some bytes, so fires in a row cost less. The first tile may
    have begun ``carry`` bytes before the block, and the last one may stay open (it costs staleness, but no tile).

    A tile start is dropped, without loss, once a later one that may end a tile here is as cheap: staleness grows with
    age, so the older start stays behind for ever. The starts before the cheapest are dropped at each byte, hence the
    search for the cheapest costs one look per byte, and the rest of the work is one sum over consecutive numbers.

    Args:
        density: [L] bits, at least 0. staleness: [>= carry + L + 1] share lost by age, never falling.
        price: bits per tile. entry: bits lost by a tile of more than one byte, beside its staleness.
        carry: age that the byte before the block had (0: it fired).
        min_size, max_size: bounds on bytes per tile; one that the carry already broke ends as soon as it may.

    Returns:
        fires [L] of 0 and 1, the number of tiles, and the cost in bits.
    """
    length = density.shape[0]
    cost = np.full(length + 1, np.inf)  # cost[s]: of the bytes read so far, if the last one that fired is s - 1
    back = np.zeros(length + 1, np.int64)
    eldest = min(max_size, length)
    share = staleness[eldest::-1].copy()  # by start, so the age falls
    opening = 0.0  # the same for the tile that began before the block
    opening_end = max(max_size - carry, 1)
    oldest = 1
    for byte in range(length):
        end = byte + 1
        oldest = max(oldest, end - max_size)
        least = np.inf
        for value in cost[oldest : max(end - min_size + 1, oldest)]:
            least = min(least, value)
        chosen = np.inf
        if end <= opening_end and carry + end >= min_size:
            chosen = opening + (entry if carry + end > 1 else 0.0)
        if least < np.inf:
            while cost[oldest] > least:
                oldest += 1
            for start in (oldest, byte if min_size == 1 else oldest):  # the cheapest, and the one that enters for free
                value = cost[start] + (entry if end - start > 1 else 0.0)
                if value < chosen:
                    chosen = value
                    back[end] = start
            if least <= opening:
                opening_end = 0
        bits = density[byte]
        live = cost[oldest:end]  # slices, counted from 0: numba vectorises what needs no look at negative indices
        lost = share[eldest - end + oldest :]
        for index in range(live.shape[0]):
            live[index] += bits * lost[index]
        opening += bits * staleness[carry + end]
        cost[end] = chosen + price
    total = opening if length < opening_end else np.inf
    last = 0
    for start in range(max(oldest, length - max_size + 1), length + 1):
        if cost[start] < total:
            total = cost[start]
            last = start
    fires, tiles = _follow(back, last)
    return fires, tiles, total


@njit(cache=True)
def plan_sizes(
    density: Floats, staleness: Floats, price: float, entry: float, carry: int, sizes: Integers
) -> tuple[Bytes, int, float]:  # pragma: no cover - compiled
    """:func:`plan_block` for tiles whose sizes are any set, rising; all the sizes of an interval give its plans.

    The last tile may stay open while it is shorter than the greatest size. A first tile that the carry has made too
    long for every size ends at its first byte.
    """
    length, longest = density.shape[0], sizes[-1]
    cost = np.full(length + 1, np.inf)  # as in plan_block; cost[0] is of the tile that began before the block
    cost[0] = 0.0
    back = np.zeros(length + 1, np.int64)
    for byte in range(length):
        end = byte + 1
        chosen = np.inf
        if carry >= longest and end == 1:
            chosen = entry if carry > 0 else 0.0
        for size in sizes:
            start = end - size if size < end else 0
            value = cost[start] + (entry if size > 1 else 0.0)
            if (start > 0 or size == carry + end) and value < chosen:
                chosen = value
                back[end] = start
        for start in range(1, end):
            cost[start] += density[byte] * staleness[end - start]
        cost[0] += density[byte] * staleness[carry + end]
        cost[end] = chosen + price
        if end >= max(longest - carry, 1):
            cost[0] = np.inf
        if end >= longest + 1:
            cost[end - longest] = np.inf
    last = 0
    for start in range(1, length + 1):
        if cost[start] < cost[last]:
            last = start
    total = cost[last]
    fires, tiles = _follow(back, last)
    return fires, tiles, total


@njit(cache=True)
def _follow(back: Integers, last: int) -> tuple[Bytes, int]:  # pragma: no cover - compiled
    """Fires of the tiling whose last closed tile ends at ``last``, from where each tile begins, and their number."""
    fires = np.zeros(back.shape[0] - 1, np.uint8)
    tiles = 0
    while last > 0:
        fires[last - 1] = 1
        tiles += 1
        last = back[last]
    return fires, tiles


@njit(cache=True)
def plan_blocks(
    density: Floats,
    staleness: Floats,
    prices: Floats,
    entry: float,
    carries: Integers,
    min_size: int,
    max_size: int,
) -> tuple[Bytes, Integers, Floats]:  # pragma: no cover - compiled
    """:func:`plan_block` for R blocks of one length, each at its own price and carry.

    Args:
        density: [R, L]. prices: [R]. carries: [R].

    Returns:
        fires [R, L], tiles [R], and costs [R] in bits.
    """
    rows = density.shape[0]
    fires = np.empty(density.shape, np.uint8)
    tiles = np.empty(rows, np.int64)
    costs = np.empty(rows)
    for row in range(rows):
        fires[row], tiles[row], costs[row] = plan_block(
            density[row], staleness, prices[row], entry, carries[row], min_size, max_size
        )
    return fires, tiles, costs


@njit(cache=True)
def tiling_loss(fires: Bytes, density: Floats, staleness: Floats, carry: int) -> float:  # pragma: no cover - compiled
    """Bits lost to staleness under given fires; arguments as in :func:`plan_block`."""
    age = carry
    loss = 0.0
    for byte in range(density.shape[0]):
        age = 0 if fires[byte] else age + 1
        loss += density[byte] * staleness[age]
    return loss


@njit(cache=True)
def smooth_rows(density: Floats, levels: Floats, seen: Integers, window: int) -> Floats:  # pragma: no cover - compiled
    """A causal exponential average of densities [B, L] with weight 1 / min(positions, window).

    Args:
        density: [B, L]. levels: [B] the averages before, replaced by those after. seen: [B] positions before.
    """
    out = np.empty_like(density)
    for b in range(density.shape[0]):
        level = levels[b]
        for t in range(density.shape[1]):
            level += (density[b, t] - level) / min(seen[b] + t + 1, window)
            out[b, t] = level
        levels[b] = level
    return out


@njit(cache=True)
def smooth_rows_gradient(gradient: Floats, window: int) -> Floats:  # pragma: no cover - compiled
    """The gradient [B, L] by the densities of :func:`smooth_rows` from a start, of one [B, L] by its averages."""
    out = np.empty_like(gradient)
    for b in range(gradient.shape[0]):
        reach = 0.0
        for t in range(gradient.shape[1] - 1, -1, -1):
            weight = 1.0 / min(t + 1, window)
            reach += gradient[b, t]
            out[b, t] = weight * reach
            reach *= 1.0 - weight
    return out


@njit(cache=True)
def pacing_error(fires: float, quota: float, position: float, rate: float) -> float:  # pragma: no cover - compiled
    """Fires ahead (positive) or behind (negative) of the quota, in units of the tolerated gap at ``position``."""
    return (fires - quota) / max(6.0, (0.01 + 0.02 * rate) * position)


@njit(cache=True)
def fires_now(
    density: float,
    staleness: Floats,
    rate: float,
    log_threshold: float,
    spread: float,
    inertia: float,
    last_fire: int,
    fires: float,
    quota: float,
    position: int,
    min_size: int,
    max_size: int,
) -> bool:  # pragma: no cover - compiled
    """The causal firing rule at one byte, of a rate between 0 and 1.

    Fires where ``density * staleness(age) >= exp(log_threshold + spread * (e + 4 e^3 + i))``, e the pacing error, or
    where the tile is full and the quota is not exceeded. i is the inertia: it keeps a stretch of fires going (-) and
    delays the next one (+). ``FARTHEST`` gaps behind the quota every byte fires, as far ahead of it none.

    Args:
        density: bits. staleness: table by age, its last entry serves all greater ages. rate: allowed fires per byte.
        log_threshold: calibrated for the rate. spread: of the log density over text. inertia: in spreads.
        last_fire, fires: before the byte. quota, position: the byte included.
    """
    age = position - last_fire if last_fire > 0 else max_size
    if age < min_size:
        return False
    error = pacing_error(fires, quota, position, rate)
    if abs(error) >= FARTHEST:
        return error < 0.0
    held = -inertia if age == 1 else inertia
    threshold = math.exp(min(log_threshold + spread * (error + 4.0 * error**3 + held), 700.0))
    return bool(density * staleness[min(age, staleness.shape[0] - 1)] >= threshold or (age >= max_size and error < 1.0))


@njit(cache=True)
def fire_online(
    density: Floats,
    staleness: Floats,
    rate: float,
    log_threshold: float,
    spread: float,
    inertia: float,
    last_fire: int,
    fires_before: int,
    quota: float,
    position: int,
    min_size: int,
    max_size: int,
) -> Bytes:  # pragma: no cover - compiled
    """The causal firing rule, :func:`fires_now`, over consecutive bytes. Rate 0 never fires, rate 1 always.

    Args:
        density: [L] bits. staleness: table by age, its last entry serves all greater ages.
        rate: allowed fires per byte. log_threshold: calibrated for that rate. spread: of the log density over text.
        inertia: in spreads.
        last_fire, fires_before, quota, position: the router's state before the first byte.

    Returns:
        [L] of 0 and 1.
    """
    length = density.shape[0]
    out = np.zeros(length, np.uint8)
    if rate <= 0.0:
        return out
    fires = float(fires_before)
    for t in range(length):
        here = position + t + 1
        quota += rate
        if rate >= 1.0 or fires_now(
            density[t], staleness, rate, log_threshold, spread, inertia, last_fire, fires, quota, here, min_size,
            max_size,
        ):  # fmt: skip
            out[t] = 1
            fires += 1.0
            last_fire = here
    return out


@njit(cache=True)
def fire_rows(
    rows: Integers,
    density: Floats,
    rates: Floats,
    log_thresholds: Floats,
    lowest_rate: float,
    spread: float,
    inertia: float,
    staleness: Floats,
    last_fire: Integers,
    fires: Integers,
    quota: Floats,
    positions: Integers,
    min_size: int,
    max_size: int,
) -> Booleans:  # pragma: no cover - compiled
    """Which of some rows [n] fire at this byte; nothing is changed.

    Args:
        rows: [n]. density: [n] bits. rates: [B] between 0 and 1. log_thresholds: calibrated at rates that double every
        two entries, from ``lowest_rate`` on. staleness: table by age, its last entry serves all greater ages.
        last_fire, fires, quota, positions: [B] the router's state before the byte.
    """
    fired = np.empty(rows.shape[0], np.bool_)
    last = log_thresholds.shape[0] - 1
    for i in range(rows.shape[0]):
        b = rows[i]
        place = min(max(2.0 * math.log2(max(rates[b], lowest_rate) / lowest_rate), 0.0), float(last))
        low = min(int(place), last - 1)
        log_threshold = log_thresholds[low] + (place - low) * (log_thresholds[low + 1] - log_thresholds[low])
        fired[i] = fires_now(
            density[i], staleness, rates[b], log_threshold, spread, inertia, last_fire[b], float(fires[b]),
            quota[b] + rates[b], positions[b] + 1, min_size, max_size,
        )  # fmt: skip
    return fired


@njit(cache=True)
def fire_evenly(rate: float, fires_before: int, quota: float, length: int) -> Bytes:  # pragma: no cover - compiled
    """Uniform firing, blind to the text: fire whenever the quota allows one more."""
    out = np.zeros(length, np.uint8)
    fires = fires_before
    for t in range(length):
        quota += rate
        if fires + 1 <= quota + 1e-9:
            out[t] = 1
            fires += 1
    return out
