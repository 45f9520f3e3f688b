"""Tilings for a budget against the exact loss of every number of tiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.adaptive.lagrange import PlannedBlock, spend_tiles
from model.adaptive.tiling import Pace, Tile, TileManager
from model.config import ModelConfig
from model.ops.tiling import staleness_table


def manager(least: int, most: int, tau: float) -> TileManager:
    tiles = TileManager(ModelConfig(min_tile_size=least, max_tile_size=most))
    tiles.log_tau.data.fill_(math.log(tau))
    return tiles


def least_losses(
    density: np.ndarray, table: np.ndarray, sizes: tuple[int, int], carry: int, entry: float
) -> dict[int, float]:
    """The least loss with exactly k tiles, for every k that some tiling has: one table over bytes per k."""
    length, (least, most) = len(density), sizes
    ends = {0: 0.0}  # loss of bytes before a tile's end
    losses: dict[int, float] = {}
    tiles = 0
    while ends:
        after: dict[int, float] = {}
        for start, loss in ends.items():
            age = carry if start == 0 else 0
            for end in range(start + 1, length + 1):
                if age >= most and end > start + 1:
                    break
                age += 1
                if age >= least:
                    after[end] = min(after.get(end, math.inf), loss + (entry if age > 1 else 0.0))
                loss += density[end - 1] * table[age]
            else:
                if age < most or start == length:
                    losses[tiles] = min(losses.get(tiles, math.inf), loss)
        ends, tiles = after, tiles + 1
    return losses


def hull(points: dict[int, float]) -> list[int]:
    """Corners of the lower convex hull that are worth their tiles, from few to many tiles."""
    corners: list[int] = []
    for k in sorted(points):
        while len(corners) >= 2:
            i, j = corners[-2:]
            if (points[j] - points[i]) * (k - i) < (points[k] - points[i]) * (j - i) - 1e-9:
                break
            corners.pop()
        corners.append(k)
    return [k for i, k in enumerate(corners) if i == 0 or points[k] < points[corners[i - 1]] - 1e-9]


def lost(found: list[Tile], density: np.ndarray, tau: float, carry: int, entry: float) -> float:
    """Bits lost by a tiling, gaps and the open tile at its end included, byte by byte."""
    ends, age, total = {tile.end for tile in found}, carry, 0.0
    for byte, bits in enumerate(density):
        fires = byte + 1 in ends
        total += entry if fires and age > 0 else 0.0
        age = 0 if fires else age + 1
        total += bits * -math.expm1(-age / tau)
    return total


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 3), st.integers(0, 12), st.integers(0, 9),
    st.floats(0.2, 9), st.floats(0, 1), st.booleans(),
)  # fmt: skip
def test_a_budget_buys_the_best_tiling_on_the_hull_and_is_never_exceeded(
    seed: int, length: int, least: int, more: int, carry: int, tau: float, share: float, even: bool
) -> None:
    density = np.full(length, 0.7) if even else np.random.default_rng(seed).exponential(size=length)
    tiles, flops = manager(least, least + more, tau), 7.0
    losses = least_losses(
        density, staleness_table(tau, carry + length), (least, least + more), carry, tiles.restart_loss
    )
    fewest, most = min(losses), max(losses)
    budget = flops * (fewest + share * (most - fewest))
    found = tiles.optimize_tiling(density, budget, flops, carry=carry)
    count = len(found)
    assert sum(tile.compute_cost for tile in found) <= budget * (1 + 1e-12)
    corners = hull(losses)
    below = max(k for k in corners if k * flops <= budget * (1 + 1e-12))
    assert count >= below
    mine = lost(found, density, tau, carry, tiles.restart_loss)
    # On the hull: no number of tiles has a tiling under the line through this one and the corner below.
    assert mine == pytest.approx(losses[count], abs=1e-7)
    assert mine <= losses[below] + 1e-7
    if budget >= (count + 1) * flops:
        above = [k for k in corners if k > count]
        assert not above or above[0] * flops > budget * (1 - 1e-12)
    for start, tile in zip([-carry, *(tile.end for tile in found)], found, strict=False):
        assert least <= tile.end - start
        assert tile.end - start <= least + more or (start < 0 and tile.end == 1)


def test_on_constant_bytes_the_whole_budget_is_used() -> None:
    """Tilings of even bytes lie on long straight edges of the hull; a corner alone would leave a third unused."""
    tiles = manager(1, 64, 2.0)
    for wanted in range(8, 512, 7):
        assert wanted - 1 <= len(tiles.optimize_tiling(np.full(512, 0.3), wanted, 1.0)) <= wanted


def test_a_budget_under_the_longest_tiles_is_refused() -> None:
    tiles = manager(1, 64, 2.0)
    assert len(tiles.optimize_tiling(np.ones(640), 10.0, 1.0)) == 10
    with pytest.raises(ValueError, match=r"compute_budget = 9\.9 must be at least 10\.0 FLOPs"):
        tiles.optimize_tiling(np.ones(640), 9.9, 1.0)


def test_the_search_begins_at_a_given_plan_and_ends_at_the_same() -> None:
    density = np.random.default_rng(0).exponential(size=300)
    solve = manager(1, 64, 2.0)._solver(density, staleness_table(2.0, 300), 0, 64)
    for wanted in (10, 60, 200):
        cold = spend_tiles(solve, wanted, 1e3)
        for price in (0.05, 1.0, 4.0):
            warm = spend_tiles(solve, wanted, 1e3, solve(price))
            assert (warm.tiles, warm.loss) == (cold.tiles, pytest.approx(cold.loss, abs=1e-9))
            assert isinstance(warm, PlannedBlock)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7])
def test_serving_plans_keep_the_tile_sizes_and_know_nothing_of_later_blocks(rate: float) -> None:
    tiles, random = manager(1, 64, 3.0), np.random.default_rng(1)
    density = random.exponential(size=2048)
    other = np.concatenate([density[:1024], random.exponential(size=1024) * 9.0])

    def read(text: np.ndarray) -> np.ndarray:
        blocks: list[np.ndarray] = []
        for start in range(0, len(text), 512):
            at = np.flatnonzero(np.concatenate([np.zeros(0), *blocks]))
            pace = Pace(start, int(at[-1]) + 1 if len(at) else 0, len(at), rate * start)
            blocks.append(tiles.plan(text[start : start + 512], rate, pace))
        return np.concatenate(blocks)

    fires = read(density)
    assert np.diff(np.flatnonzero(fires)).max() <= 64
    assert np.array_equal(fires[:1024], read(other)[:1024])
    assert not np.array_equal(fires[1024:], read(other)[1024:])
