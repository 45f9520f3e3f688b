from __future__ import annotations

import numpy as np
import pytest
import torch

from model.adaptive.controller import adapt_resolution, advance, fire_step
from model.ops.tiling import fire_online, staleness_table
from model.state import RouterState

SPREAD = torch.tensor(0.5, dtype=torch.float64)
INERTIA = 3.0


def start(batch: int) -> RouterState:
    last_fire, fires, positions, waiting = torch.zeros(4, batch, dtype=torch.int64)
    quota, codes = torch.zeros(batch, dtype=torch.float64), torch.zeros(batch, 0, 0)
    return RouterState(torch.zeros(batch, 1), last_fire, fires, quota, positions, codes, waiting)


def test_the_correction_is_none_at_the_quota_and_a_wall_beyond_the_gap() -> None:
    error = torch.linspace(-3, 3, 61, dtype=torch.float64)
    waiting = adapt_resolution(
        torch.zeros_like(error), error, SPREAD, INERTIA, torch.zeros_like(error, dtype=torch.bool)
    )
    running = adapt_resolution(
        torch.zeros_like(error), error, SPREAD, INERTIA, torch.ones_like(error, dtype=torch.bool)
    )
    for corrected in (waiting, running):
        inside = corrected[18:43]  # up to 1.2 gaps from the quota
        assert (inside.diff() > 0).all()
        assert (corrected[:18] == -torch.inf).all()
        assert (corrected[43:] == torch.inf).all()
    assert waiting[30].item() == pytest.approx(SPREAD.item() * INERTIA)
    assert running[30].item() == pytest.approx(-SPREAD.item() * INERTIA)


@pytest.mark.parametrize("kind", ["random", "constant", "changing", "zero"])
def test_compute_meets_the_budget_within_five_percent(kind: str) -> None:
    length, rates = 4096, torch.tensor([0.05, 0.2, 0.5, 0.9], dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(length, generator=random) ** 4 * 8
    text = {
        "random": noise,
        "constant": torch.ones(length),
        "changing": torch.where(torch.arange(length) < 2000, noise, noise * 1e-3),
        "zero": torch.full((length,), 1e-6),
    }[kind]
    state, log_threshold = start(4), torch.zeros(4, dtype=torch.float64)
    fires = []
    for density in text:
        fired = fire_step(density.expand(4), rates, log_threshold, SPREAD, INERTIA, 2.0, state, (1, 64))
        advance(state, fired, rates)
        fires.append(fired)
    spent = torch.stack(fires).double().cumsum(0)
    # Compute is trunk and outer layers; at a trunk share of 3/4 and outer layers of 1/4 as in the embedded model.
    for length_so_far in (2048, 4096):
        ratio = (0.25 + 0.75 * spent[length_so_far - 1] / length_so_far) / (0.25 + 0.75 * rates)
        assert (ratio - 1).abs().max() < 0.05


def test_the_batched_rule_decides_as_the_compiled_one() -> None:
    density = np.random.default_rng(0).exponential(size=1000)
    for rate, least in ((0.05, 1), (0.3, 1), (0.3, 4), (1.0, 1), (0.0, 1)):
        compiled = fire_online(
            density, staleness_table(3.0, 20), rate, -0.5, SPREAD.item(), INERTIA, 0, 0, 0.0, 0, least, 20
        )
        state, rates = start(1), torch.tensor([rate], dtype=torch.float64)
        stepped = []
        for value in density:
            threshold = torch.tensor([-0.5], dtype=torch.float64)
            fired = fire_step(torch.tensor([value]), rates, threshold, SPREAD, INERTIA, 3.0, state, (least, 20))
            advance(state, fired, rates)
            stepped.append(int(fired))
        assert compiled.tolist() == stepped
