from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

import model.decoding as model_decoding
from model.config import ModelConfig
from model.cost import CostModel, Flops
from tests.model.shapes import PROPAGATING, SMALL, random_model, random_tokens, without_compiled_code

COST = CostModel(ModelConfig())


def matrix_products(config: ModelConfig, width: int) -> int:
    """Operations of one block's two projections at one position."""
    inner = config.inner(width)
    return 2 * width * (2 * inner + 2 * config.d_state + config.heads(width)) + 2 * inner * width


def recurrence(config: ModelConfig, width: int) -> int:
    """What the cost model books for one block's convolution and state at one position."""
    inner = config.inner(width)
    return 2 * config.d_conv * (inner + 2 * config.d_state) + 5 * inner * config.d_state


@pytest.mark.parametrize("rate", [1.0, 0.0])
def test_matrix_products_of_a_step_are_counted_as_torch_counts_them(
    rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step multiplies matrices in its projections and its head only; the compiled loops are invisible to torch."""
    without_compiled_code(monkeypatch)
    model, config, rows = random_model(), SMALL, 4
    state = model.allocate_state(rows)
    with FlopCounterMode(display=False) as counter:
        model.step(random_tokens(rows, 1)[:, 0], state, torch.full((rows,), rate, dtype=torch.float64))
    fires = int(rate)
    booked = model.cost.flops(1, fires, 1, 0).total
    outer = config.encoder_layers + config.decoder_layers
    booked -= outer * recurrence(config, config.d_model) + fires * config.trunk_layers * recurrence(
        config, config.d_trunk
    )
    assert counter.get_total_flops() == rows * booked


def test_a_block_is_its_projections_and_its_recurrence() -> None:
    unit = CostModel(SMALL).unit
    assert unit.encoder == matrix_products(SMALL, 32) + recurrence(SMALL, 32)
    assert unit.trunk == 2 * (matrix_products(SMALL, 48) + recurrence(SMALL, 48)) + 2 * 2 * 32 * 48


def test_columns_of_the_state_that_do_not_run_are_not_billed() -> None:
    cost = CostModel(SMALL)
    for columns in SMALL.d_state_levels:
        spared = SMALL.trunk_layers * 5 * SMALL.inner(SMALL.d_trunk) * (SMALL.d_state - columns)
        shrunk, whole = cost.flops(10, 4, 2, 10, columns), cost.flops(10, 4, 2, 10)
        assert whole.trunk - shrunk.trunk == 4 * spared
        assert whole.total - shrunk.total == 4 * spared


def test_operations_add_up() -> None:
    whole = COST.flops(10, 4, 2, 10)
    parts = COST.flops(7, 3, 1, 7) + COST.flops(3, 1, 1, 3)
    assert parts == whole
    assert whole.total == sum(whole.as_dict().values())
    assert Flops().total == 0
    assert COST.full_flops(10, 2) == COST.flops(10, 10, 2, 0).total


@pytest.mark.parametrize("budget", [0.29, 0.3, 0.5, 0.9, 1.0])
def test_a_rate_spends_its_budget_exactly(budget: float) -> None:
    rates = COST.rates(budget)
    assert COST.budget(rates.prefill, logits=0) == pytest.approx(budget, abs=1e-12)
    assert COST.budget(rates.decode, logits=1) == pytest.approx(budget, abs=1e-12)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
def test_what_a_budget_buys_is_billed_at_that_budget(budget: float) -> None:
    """The density is part of the bill: leaving it out would spend less than was granted."""
    positions, rates = 1_000_000, COST.rates(budget)
    for rate, logits in ((rates.prefill, 0), (rates.decode, positions)):
        spent = COST.flops(positions, round(rate * positions), logits, positions).total
        assert spent / COST.full_flops(positions, logits) == pytest.approx(budget, abs=1e-5)


def test_a_density_that_measures_nothing_costs_its_network_alone() -> None:
    shape = ModelConfig(density_hidden=64, density_measured=False)
    cost, measured = CostModel(shape), CostModel(ModelConfig(density_hidden=64))
    assert cost.unit.density == 2 * 64 * (shape.d_model + 4)
    attention = (4 * shape.inner(shape.d_model) + 2 * shape.density_window) * shape.d_state
    assert measured.unit.density == cost.unit.density + measured.unit.head + attention
    assert cost.floor < cost.least_adaptive < measured.least_adaptive
    with pytest.raises(ValidationError, match="density_hidden must be at least 1"):
        ModelConfig(density_measured=False)


def test_full_budget_fires_always_and_too_small_a_budget_never() -> None:
    assert (COST.rates(1.0).prefill, COST.rates(1.0).decode) == (1.0, 1.0)
    assert 0 < COST.floor < COST.least_adaptive < 0.3
    assert (COST.rates(COST.least_adaptive - 1e-9).prefill, COST.rates(0.01).decode) == (0.0, 0.0)
    assert COST.rates(COST.least_adaptive).decode == pytest.approx(1 / ModelConfig().max_tile_size)


@pytest.mark.parametrize("budget", [0.97, 0.98, 0.999, 0.9999])
def test_a_budget_just_under_full_never_asks_for_more_than_every_byte(budget: float) -> None:
    assert 0.0 < COST.rates(budget).prefill <= 1.0
    assert 0.0 < COST.rates(budget).decode <= 1.0
    assert COST.budget(COST.rates(budget).decode, logits=1) <= budget + 1e-12


@pytest.mark.parametrize("fires", [True, False])
def test_what_states_read_between_fires_is_counted_as_torch_counts_it(
    fires: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiled_code(monkeypatch)
    config, rows = PROPAGATING, 4
    model = random_model(config)
    monkeypatch.setattr(model_decoding, "fire_step", lambda *_: torch.full((rows,), fires))
    state = model.allocate_state(rows)
    with FlopCounterMode(display=False) as counter:
        fired = model.step(random_tokens(rows, 1)[:, 0], state, torch.full((rows,), 0.5, dtype=torch.float64)).fired
    assert fired.tolist() == [fires] * rows
    inner, mixed = config.inner(config.d_trunk), config.inner(config.d_trunk) + 2 * config.d_state
    written = 3 * config.d_state_levels[0]
    booked = model.cost.flops(1, int(fires), 1, 1).total
    outer = config.encoder_layers + config.decoder_layers
    booked -= outer * recurrence(config, config.d_model)
    booked -= config.trunk_layers * (
        recurrence(config, config.d_trunk) if fires else 2 * config.d_conv * mixed + inner * written
    )
    assert counter.get_total_flops() == rows * booked


def test_budgets_pay_for_what_states_read_between_fires() -> None:
    cost, skips = CostModel(PROPAGATING), CostModel(SMALL)
    assert skips.propagation() == 0
    assert 0 < cost.propagation() < 0.5 * cost.unit.trunk
    assert cost.flops(10, 4, 2, 10).trunk == 4 * cost.unit.trunk + 6 * cost.propagation()
    assert cost.flops(10, 4, 2, 0, propagated=6) == replace(cost.flops(10, 4, 2, 10), density=0)
    spared = PROPAGATING.trunk_layers * PROPAGATING.inner(PROPAGATING.d_trunk) * (16 - 4)
    shrunk, whole = cost.flops(10, 4, 2, 10, 4), cost.flops(10, 4, 2, 10)
    assert whole.trunk - shrunk.trunk == 4 * 5 * spared
    for budget in (cost.least_adaptive, 0.6, 0.95):
        rates = cost.rates(budget)
        for rate, logits in ((rates.prefill, 0), (rates.decode, 1_000_000)):
            spent = cost.flops(1_000_000, round(rate * 1_000_000), logits, 1_000_000).total
            assert spent / cost.full_flops(1_000_000, logits) == pytest.approx(budget, abs=1e-5)
