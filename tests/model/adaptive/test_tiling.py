from __future__ import annotations

import numpy as np
import pytest

from model.adaptive.tiling import Pace, TileManager
from model.config import ModelConfig

TEXTS = {
    "random": np.random.default_rng(0).exponential(size=8192),
    "constant": np.full(8192, 0.3),
    "changing": np.concatenate([np.full(4096, 0.01), np.random.default_rng(1).exponential(size=4096) * 3]),
}


def planned(tiles: TileManager, density: np.ndarray, rate: float) -> np.ndarray:
    """Fires of a whole text, planned block by block as serving does."""
    blocks: list[np.ndarray] = []
    for start in range(0, len(density), tiles.block_size):
        before = np.concatenate([np.zeros(0, np.uint8), *blocks])
        at = np.flatnonzero(before)
        pace = Pace(start, int(at[-1]) + 1 if len(at) else 0, len(at), rate * start)
        blocks.append(tiles.plan(density[start : start + tiles.block_size], rate, pace))
    return np.concatenate(blocks)


@pytest.mark.parametrize("rate", [1 / 64, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("text", TEXTS)
def test_plans_keep_the_budget_within_two_percent_on_any_text(text: str, rate: float) -> None:
    fires = planned(TileManager(ModelConfig()), TEXTS[text], rate)
    for length in (2048, 8192):
        # Outer layers cost a quarter of full compute, the trunk the rest, as in the embedded model.
        spent = 0.25 + 0.75 * fires[:length].mean()
        assert spent == pytest.approx(0.25 + 0.75 * rate, rel=0.02)


def test_a_plan_costs_less_than_even_tiles_of_the_same_number() -> None:
    tiles, density = TileManager(ModelConfig()), TEXTS["random"][:512]
    price = 0.8
    found = tiles.cheapest_tiling(density, price, 1.0)
    even = np.linspace(0, 512, len(found) + 1).astype(int)

    def lost(ends: list[int]) -> float:
        fires = np.zeros(512)
        fires[np.array(ends) - 1] = 1
        age = np.zeros(512)
        for t in range(512):
            age[t] = 0 if fires[t] else (age[t - 1] if t else 0) + 1
        return float((density * -np.expm1(-age / tiles.tau)).sum())

    ends = [tile.end for tile in found]
    # What follows the last tile is open in the plan, and belongs to its cost all the same.
    assert lost(ends) < 0.8 * lost(list(even[1:]))


def test_tiles_follow_each_other_within_their_sizes() -> None:
    tiles = TileManager(ModelConfig(min_tile_size=3, max_tile_size=20))
    found = tiles.cheapest_tiling(TEXTS["random"][:500], 1.0, 1.0)
    assert [tile.start for tile in found] == [0, *(tile.end for tile in found[:-1])]
    assert all(3 <= tile.end - tile.start <= 20 for tile in found)
    assert 500 - found[-1].end < 20
    assert all(tile.info_loss >= 0 for tile in found)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_ends_of_the_dial_need_no_plan(rate: float) -> None:
    plan = TileManager(ModelConfig()).plan(TEXTS["random"][:100], rate, Pace(0, 0, 0, 0.0))
    assert (plan == rate).all()


def test_tiles_have_only_the_sizes_that_are_allowed_and_keep_the_budget() -> None:
    tiles, density = TileManager(ModelConfig()), np.random.default_rng(5).exponential(size=300)
    density[:60] *= 50.0
    plan = tiles.optimize_tiling(density, 40.0, 1.0, sizes=(1, 8, 32))
    lengths = {tile.end - tile.start for tile in plan}
    assert lengths <= {1, 8, 32}
    assert len(lengths) > 1
    assert 30 <= len(plan) <= 40
    priced = tiles.cheapest_tiling(density, 3.0, 1.0, sizes=(8, 32))
    assert {tile.end - tile.start for tile in priced} <= {8, 32}


@pytest.mark.parametrize("sizes", [(), (8, 8), (8, 4), (0, 4), (4, 129)])
def test_sizes_that_do_not_rise_or_leave_the_bounds_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sizes = .* must rise"):
        TileManager(ModelConfig()).optimize_tiling(np.ones(20), 20.0, 1.0, sizes=sizes)
