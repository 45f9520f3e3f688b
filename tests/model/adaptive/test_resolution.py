"""Resolution and budget on densities of the embedded model: real text, constant bytes, random bytes, mixed domains."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from model.adaptive.resolution import region_density, region_resolutions
from model.adaptive.tiling import Pace, TileManager
from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import FARTHEST, pacing_error

LENGTH = 4096
TEXTS = ("real", "constant", "random", "changing")
BUDGETS = (0.4, 0.5, 0.75, 0.95)


@pytest.fixture(scope="module")
def embedded() -> AdaptiveAttentionSystem:
    return load_checkpoint(EMBEDDED_CHECKPOINT, torch.device("cpu"))


Densities = dict[int | None, dict[str, np.ndarray]]
"""By the depth at which the stage ends that they place, and by text."""


@pytest.fixture(scope="module")
def densities(embedded: AdaptiveAttentionSystem) -> Densities:
    real = Path(argparse.__file__).read_bytes()[20_000 : 20_000 + LENGTH]
    noise = np.random.default_rng(0).integers(0, 256, LENGTH, dtype=np.uint8).tobytes()
    half = LENGTH // 2
    texts = dict(zip(TEXTS, (real, b"a" * LENGTH, noise, real[:half] + noise[:half]), strict=True))
    tokens = torch.tensor([list(text) for text in texts.values()])
    depths = (*embedded.config.shallow_depths, None)
    return {depth: dict(zip(texts, embedded.analyse(tokens, depth).numpy(), strict=True)) for depth in depths}


def compute_ratio(model: AdaptiveAttentionSystem, fires: np.ndarray, budget: float, logits: int) -> np.ndarray:
    """Compute spent over compute granted, after each byte."""
    depth, counts = model.cost.depth(budget), enumerate(fires.cumsum(dtype=np.int64), start=1)
    spent = [
        model.cost.flops(n, int(k), n * logits, n, depth=depth).total / model.cost.full_flops(n, n * logits)
        for n, k in counts
    ]
    return np.array(spent) / budget


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("mistake", [-10.0, 0.0, 10.0])
def test_online_compute_meets_the_target_from_either_side(
    embedded: AdaptiveAttentionSystem, densities: Densities, text: str, budget: float, mistake: float
) -> None:
    """A threshold ten spreads of the density too low begins over the target, one too high begins under it."""
    rates = embedded.cost.rates(budget)
    rate, (_, tiles) = rates.decode, embedded.placement(rates.depth)
    log_threshold = tiles.log_at(tiles.log_thresholds, rate) + mistake * tiles.spread
    fires = tiles.online(densities[rates.depth][text], rate, Pace(0, 0, 0, 0.0), log_threshold)
    ratio = compute_ratio(embedded, fires, budget, 1)
    assert np.abs(ratio[2047:] - 1).max() < 0.05


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("text", TEXTS)
def test_planned_compute_meets_the_target(
    embedded: AdaptiveAttentionSystem, densities: Densities, text: str, budget: float
) -> None:
    rates = embedded.cost.rates(budget)
    rate, (_, tiles), density = rates.prefill, embedded.placement(rates.depth), densities[rates.depth][text]
    blocks = [np.zeros(0, np.uint8)]
    for start in range(0, LENGTH, 512):
        at = np.flatnonzero(np.concatenate(blocks))
        pace = Pace(start, int(at[-1]) + 1 if len(at) else 0, len(at), rate * start)
        blocks.append(tiles.plan(density[start : start + 512], rate, pace))
    ratio = compute_ratio(embedded, np.concatenate(blocks), budget, 0)
    assert np.abs(ratio[2047::512] - 1).max() < 0.05  # where blocks end; within one, tiles stand where they lose least


@pytest.mark.parametrize("budget", [0.5, 0.75])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("gaps", [-3, 3])
def test_a_sequence_off_its_quota_returns_without_oscillation(
    embedded: AdaptiveAttentionSystem, densities: Densities, text: str, budget: float, gaps: int
) -> None:
    """Three tolerated gaps behind or ahead, as after a change of budget: straight back, not out at the far side."""
    rates, at = embedded.cost.rates(budget), 4096
    rate, (_, tiles) = rates.decode, embedded.placement(rates.depth)
    gap = 0.01 + 0.02 * rate
    before = round(rate * at + gaps * gap * at)
    fires = tiles.online(densities[rates.depth][text], rate, Pace(at, at, before, rate * at))
    position = at + np.arange(1, LENGTH + 1)
    counts = before + fires.cumsum(dtype=np.int64)
    error = np.array(
        [pacing_error(*each) for each in zip(counts, rate * position, position, [rate] * LENGTH, strict=True)]
    )
    inside = int(np.argmax(np.abs(error) < FARTHEST))
    # Every byte fires, or none; the gap grows meanwhile.
    speed = 1.0 - rate if gaps < 0 else rate
    assert inside == pytest.approx((abs(gaps) - FARTHEST) * gap * at / (speed + FARTHEST * gap), abs=3)
    assert (np.sign(gaps) * np.diff(error[:inside])).max() < 0  # towards the quota at every byte
    # Then stretches of fires and gaps by turns, between the walls.
    assert np.abs(error[inside:]).max() <= FARTHEST


def test_online_firing_leaves_the_dense_passages_last() -> None:
    """Passages of density 1, 2 and 4 by turns: as the budget falls, each lower density gives up its fires first.

    They are as long as the tolerated gap allows: a longer one may not run further ahead of the quota.
    """
    scale = np.tile(np.repeat([1.0, 2.0, 4.0], 32), LENGTH // 96 + 1)[:LENGTH]
    density = scale * np.random.default_rng(0).uniform(0.8, 1.2, LENGTH)
    tiles = TileManager(ModelConfig())
    tiles.update_spread(density, 1.0)
    tiles.log_tau.data.fill_(math.log(0.1))  # as fitted: one byte later an update is worth nothing
    rates = (0.9, 0.7, 0.5, 0.3, 0.1)
    kept = {}
    for rate in rates:
        # The threshold that this rate implies here: the calibrated one belongs to another model.
        log_threshold = float(np.log(np.quantile(density, 1.0 - rate)))
        fires = tiles.online(density, rate, Pace(0, 0, 0, 0.0), log_threshold)
        kept[rate] = [fires[scale == value].mean() for value in (1.0, 2.0, 4.0)]
        assert kept[rate] == sorted(kept[rate])
        assert kept[rate][2] - kept[rate][0] > min(0.1, 1.0 - rate) / 2
        assert kept[rate][2] > rate > kept[rate][0]
    for high, low in itertools.pairwise(rates):
        assert all(after <= before + 0.02 for before, after in zip(kept[high], kept[low], strict=True))
    assert kept[0.1][2] > 3 * kept[0.1][0]


SIZES = np.array([64.0, 16.0, 4.0, 2.0, 1.0])
COSTS = 1.0 / SIZES
LOSSES = (1.0 - COSTS) ** 2


@pytest.mark.parametrize("text", TEXTS)
def test_regions_meet_the_target_and_the_densest_keep_resolution_longest(densities: Densities, text: str) -> None:
    density = region_density(densities[None][text], 32)
    assert density == pytest.approx(densities[None][text].reshape(-1, 32).mean(1))
    by_density = np.argsort(density, kind="stable")
    previous = np.full(len(density), len(SIZES) - 1)
    for target in np.linspace(1.0, 0.1, 40) * len(density):
        levels = region_resolutions(density, COSTS, LOSSES, target)
        assert 0.95 * target <= COSTS[levels].sum() <= target * (1 + 1e-9)
        assert (levels <= previous).all()  # a lower target raises nothing: no oscillation
        distinct = np.diff(density[by_density]) > 0
        assert (np.diff(levels[by_density])[distinct] >= 0).all()
        previous = levels


def test_regions_lose_least_of_all_resolutions_that_cost_no_more() -> None:
    random = np.random.default_rng(3)
    costs, losses = np.array([0.1, 0.3, 0.6, 1.0]), np.array([1.0, 0.5, 0.2, 0.0])
    density = random.exponential(size=5)
    everything = np.array(list(itertools.product(range(4), repeat=5)))
    for target in np.linspace(0.5, 5.0, 30):
        levels = region_resolutions(density, costs, losses, target)
        affordable = costs[everything].sum(1) <= costs[levels].sum() + 1e-12
        least = (losses[everything] @ np.diag(density)).sum(1)[affordable].min()
        assert (losses[levels] * density).sum() == pytest.approx(least)


def test_a_target_under_the_least_compute_gets_the_least() -> None:
    assert not region_resolutions(np.ones(4), COSTS, LOSSES, 0.0).any()


def test_a_short_last_region_is_the_mean_of_the_last_window() -> None:
    assert region_density(np.arange(10.0), 4).tolist() == [1.5, 5.5, 7.5]


@pytest.mark.parametrize("losses", [[1.0, 0.9, 0.0], [0.0, 0.5, 1.0]])
def test_losses_that_fall_ever_more_are_refused(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="fall ever less"):
        region_resolutions(np.ones(2), np.array([1.0, 2.0, 3.0]), np.array(losses), 4.0)
