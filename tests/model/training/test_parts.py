from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model.adaptive.tiling import RATES, Pace
from model.training.calibration import calibrate, find_least_rate
from model.training.config import TrainingConfig
from model.training.firing import Reduced, choose_fires, sample_reduced
from model.training.loss import compute_loss, divergence
from model.training.muon import _launched_together, _shared_out, orthogonalise
from tests.model.shapes import SHALLOW, SMALL, random_model, random_tokens

REDUCED = Reduced(rate=0.3, uniform=False, d_state=None, momentum=0.1)


@pytest.mark.parametrize("shape", [(8, 8), (32, 5), (5, 32)])
def test_muon_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(1, *shape), iterations=10))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_muon_brings_matrices_together_where_it_would_one_by_one() -> None:
    torch.manual_seed(0)
    together = torch.randn(3, 32, 5, dtype=torch.float64)
    expected = torch.cat([orthogonalise(matrix) for matrix in together.split(1)])
    torch.testing.assert_close(orthogonalise(together), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("device", "groups"), [("cpu", [[0], [1], [2]]), ("meta", [[0, 2], [1]])])
def test_muon_groups_matrices_by_shape_where_launches_are_dear(device: str, groups: list[list[int]]) -> None:
    matrices = [torch.empty(shape, device=device) for shape in ((4, 6), (6, 4), (4, 6))]
    launched = _launched_together(matrices)
    numbers = {id(matrix): number for number, matrix in enumerate(matrices)}
    assert [[numbers[id(matrix)] for matrix in group] for group in launched] == groups


def test_processes_share_the_dearest_matrices_first() -> None:
    assert _shared_out([4, 1, 8, 5], 2) == [1, 0, 0, 1]
    assert _shared_out([4, 1, 8, 5], 1) == [0, 0, 0, 0]


def test_the_loss_reaches_every_part_of_the_model() -> None:
    model = random_model().requires_grad_(True).train()
    loss = compute_loss(model, random_tokens(2, 97), REDUCED, TrainingConfig())
    loss.total.backward()
    assert set(loss.bits) == {"full", "exit", "reduced", "floor"}
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # Used only when the state is resized, which this step does not do.
    assert all("fold" in name or "level_scale" in name for name in unused)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_the_divergence_is_a_mean_over_all_texts() -> None:
    torch.manual_seed(0)
    logits, full = torch.randn(2, 3, 7, 11, dtype=torch.float64).unbind(0)
    mine, given = logits.log_softmax(-1), full.log_softmax(-1)
    expected = (given.exp() * (given - mine)).sum(-1).mean()
    torch.testing.assert_close(divergence(logits.float(), full.float()), expected.float())


def test_a_reduced_pass_that_fires_everywhere_costs_what_full_resolution_does() -> None:
    model = random_model()
    loss = compute_loss(model, random_tokens(1, 97), Reduced(1.0, False, None, 0.1), TrainingConfig())
    assert loss.bits["reduced"] == pytest.approx(loss.bits["full"], abs=1e-4)


def test_full_resolution_alone_is_the_plain_cross_entropy() -> None:
    model, tokens = random_model(), random_tokens(2, 50)
    loss = compute_loss(model, tokens, None, TrainingConfig())
    expected = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss.total, expected)


def test_fires_meet_the_rate_and_follow_the_text_unless_uniform() -> None:
    tiles = random_model().tiles
    density = np.random.default_rng(0).exponential(size=(2, 20)).repeat(50, axis=1)
    fires = choose_fires(tiles, density, REDUCED)
    assert fires.mean() == pytest.approx(0.3, abs=0.03)
    assert density[fires].mean() > 1.5 * density[~fires].mean()
    even = choose_fires(tiles, density, Reduced(0.25, True, None, 0.1))
    assert np.array_equal(even, np.tile(np.arange(1, 1001) % 4 == 0, (2, 1)))
    assert not choose_fires(tiles, density, Reduced(0.0, False, None, 0.1)).any()


def test_resolutions_are_drawn_as_configured() -> None:
    config = TrainingConfig()
    drawn = [sample_reduced(config, SMALL, step) for step in range(2000)]
    assert drawn[:20] == [sample_reduced(config, SMALL, step) for step in range(20)]
    assert np.mean([one.rate == 0 for one in drawn]) == pytest.approx(config.floor_share, abs=0.04)
    assert np.mean([one.d_state is not None for one in drawn]) == pytest.approx(config.level_share, abs=0.04)
    rates = [one.rate for one in drawn if one.rate]
    assert config.lowest_rate <= min(rates) < max(rates) <= config.highest_rate


def test_the_first_steps_train_the_ends_alone_and_the_statistics_of_the_density_begin_after_them() -> None:
    config = TrainingConfig(steps=10, ends_share=0.6)
    drawn = [sample_reduced(config, SMALL, step) for step in range(10)]
    assert [one.ends_only for one in drawn] == [True] * 6 + [False] * 4
    assert all(one.rate == 0.0 for one in drawn[:6])
    assert [one.momentum for one in drawn[6:8]] == [1.0, 0.5]


def test_calibrated_thresholds_meet_their_rates_without_the_controller() -> None:
    model, tokens = random_model(), random_tokens(4, 512, seed=5)
    calibrate(model, torch.cat([tokens, tokens[:, :1]], 1))
    for table in (model.tiles.log_thresholds, model.tiles.log_prices):
        assert (table.diff() <= 0).all()
    densities = model.analyse(tokens).numpy()
    for rate in RATES[4:-1:3]:
        fires = [model.tiles.online(np.ascontiguousarray(row), rate, Pace(0, 0, 0, 0.0)).mean() for row in densities]
        assert np.mean(fires) == pytest.approx(rate, rel=0.15)


@pytest.mark.parametrize(
    ("gains", "least"),
    [
        ([0.1] * len(RATES), RATES[0]),
        ([-0.1] * 4 + [0.1] * (len(RATES) - 4), RATES[4]),
        ([0.1, -0.1] + [0.1] * (len(RATES) - 2), RATES[2]),
        ([0.1] * 5 + [0.01] + [0.1] * (len(RATES) - 6), RATES[6]),
        ([-0.1] * len(RATES), 1.0),
    ],
    ids=["always", "from a rate on", "a dip", "a dip within its error", "never"],
)
def test_a_stage_is_worth_placing_where_its_gain_is_sure(gains: list[float], least: float) -> None:
    texts = np.array([-0.02, 0.0, 0.02])  # standard error 0.0115
    assert find_least_rate(np.array(gains)[:, None] + texts) == least
    assert find_least_rate(np.array(gains)[:, None]) == (RATES[0] if min(gains) > 0.0 else least)


def test_calibration_withholds_a_stage_that_does_harm() -> None:
    model, tokens = random_model(SHALLOW), random_tokens(4, 128, seed=5)
    with torch.no_grad():
        model.trunk[2].mixer.out_proj.weight.mul_(100.0)
    calibrate(model, tokens)
    harmless, harmful = model.config.least_rates
    assert harmful == 1.0
    assert harmless in RATES
    assert model.cost.depth(math.nextafter(1.0, 0.0)) == 2
