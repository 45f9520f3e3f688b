"""A trunk that may end after some of its blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.config import ModelConfig
from model.cost import CostModel
from model.training.calibration import BUDGETS, fit_shallow_budgets
from model.training.config import TrainingConfig
from model.training.firing import Reduced, sample_reduced
from model.training.loss import compute_loss
from model.training.validation import validate
from tests.model.shapes import SHALLOW, random_model, random_tokens, without_compiled_code

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
COST = CostModel(SHALLOW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shallow_depths": (2, 1)}, "must rise strictly and end below 3"),
        ({"shallow_depths": (1, 3)}, "must rise strictly and end below 3"),
        ({"shallow_budgets": (0.5,)}, "must be none, or rise"),
        ({"shallow_budgets": (0.6, 0.5)}, "must be none, or rise"),
        ({"shallow_budgets": (0.6, 1.0)}, "less than 1"),
    ],
)
def test_depths_and_budgets_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(SHALLOW.model_dump() | change)


def test_a_depth_that_the_model_does_not_have_is_refused() -> None:
    model = random_model(SHALLOW)
    with pytest.raises(ValueError, match=r"depth = 4 must be one of \(1, 2, 3\)"):
        model.set_depth(model.allocate_state(1), 4)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("depth", SHALLOW.depths)
def test_blocks_beyond_the_depth_read_nothing(monkeypatch: pytest.MonkeyPatch, depth: int, *, compiled: bool) -> None:
    if not compiled:
        without_compiled_code(monkeypatch)
    model, tokens = random_model(SHALLOW), random_tokens(1, 40)
    state = model.allocate_state(1, depth=depth)
    model.prefill(tokens, state, 0.5)
    for column in tokens.unbind(1):
        model.step(column, state, torch.tensor([0.5], dtype=torch.float64))
    model.settle(state)
    assert [bool(block.ssm_state.any()) for block in state.trunk] == [number < depth for number in range(3)]


def test_what_waits_is_read_by_the_blocks_that_ran_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_model(SHALLOW), random_tokens(2, 40)
    late, at_once = model.allocate_state(2, depth=1), model.allocate_state(2, depth=1)
    seldom, often = (torch.full((2,), rate, dtype=torch.float64) for rate in (0.02, 0.5))

    def read(state: object) -> torch.Tensor:
        for column in tokens[:, :10].unbind(1):
            model.step(column, state, seldom)
        model.set_depth(state, 3)
        return torch.stack([model.step(column, state, often).logits for column in tokens[:, 10:].unbind(1)])

    mine = read(late)
    without_compiled_code(monkeypatch)
    torch.testing.assert_close(mine, read(at_once), **CLOSE)


def test_rows_of_other_depths_step_alike_by_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_model(SHALLOW), random_tokens(5, 40)
    rates = torch.tensor([1.0, 0.4, 0.1, 0.7, 1.0], dtype=torch.float64)
    outputs = []
    for _ in range(2):
        state = model.allocate_state(5)
        state.depth = torch.tensor([2, 1, 3, 2, 1])
        outputs.append(torch.stack([model.step(column, state, rates).logits for column in tokens.unbind(1)]))
        without_compiled_code(monkeypatch)
    torch.testing.assert_close(*outputs, **CLOSE)


def test_all_depths_at_once_are_each_of_them() -> None:
    model, tokens = random_model(SHALLOW).requires_grad_(True), random_tokens(2, 50)
    hidden = model.encode(tokens, model.allocate_state(2).encoder).hidden
    outputs = model.combine_everywhere(hidden, SHALLOW.depths)
    for depth, output in zip(SHALLOW.depths, outputs, strict=True):
        torch.testing.assert_close(model.head(output), model(tokens, depth=depth), **CLOSE)
    assert not torch.allclose(outputs[0], outputs[1])


def test_a_budget_buys_the_depth_that_it_was_fitted_to() -> None:
    assert [COST.depth(budget) for budget in (0.1, 0.45, 0.5, 0.6, 0.61, 1.0)] == [1, 1, 2, 2, None, None]
    assert CostModel(SHALLOW.model_copy(update={"shallow_budgets": ()})).depth(0.3) is None
    for budget in (COST.least_adaptive, 0.4, 0.5, 0.6, 0.7):
        rates = COST.rates(budget)
        for rate, logits in ((rates.prefill, 0), (rates.decode, 1)):
            if rate < 1.0:
                count = 1_000_000
                spent = COST.flops(count, round(rate * count), logits * count, count, depth=rates.depth).total
                assert spent / COST.full_flops(count, logits * count) == pytest.approx(budget, abs=1e-5)
    deepest = CostModel(SHALLOW.model_copy(update={"shallow_depths": (), "shallow_budgets": ()}))
    assert COST.floor == deepest.floor < COST.least_adaptive < deepest.least_adaptive


def test_a_depth_that_runs_everywhere_spends_no_more() -> None:
    most = COST.budget(1.0, logits=1, depth=1)
    assert COST.rate(most + 0.01, logits=1, depth=1) == 1.0
    assert COST.rate(most - 0.01, logits=1, depth=1) < 1.0
    assert COST.flops(8, 8, 8, 0, depth=1).total == round(most * COST.full_flops(8, 8))


@pytest.mark.parametrize(
    ("better", "expected"),
    [
        ((0.9, 0.9), (0.9, 0.9)),
        ((0.4, 0.5), (0.4, 0.5)),
        ((0.0, 0.5), (0.0, 0.5)),
        ((0.5, 0.0), (0.5, 0.5)),
        ((0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_shallow_budgets_end_where_a_deeper_trunk_is_better(
    better: tuple[float, float], expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two depths are better than the whole up to the budgets ``better``, the first before the second."""
    model, texts = random_model(SHALLOW), random_tokens(1, 10)
    budgets = [b for b in BUDGETS if COST.rate(b, logits=1, depth=1) > 0.0]

    def bits_at(_model: object, _tokens: object, _densities: object, depth: int, rates: list[float]) -> list[float]:
        assert rates == [COST.rate(budget, logits=1, depth=depth) for budget in budgets]
        if depth == 3:
            return [1.0] * len(rates)
        gain = 0.2 if depth == 1 else 0.1
        return [1.0 - gain if budget <= better[depth - 1] else 1.0 + gain for budget in budgets]

    monkeypatch.setattr("model.training.calibration.bits_at", bits_at)
    assert fit_shallow_budgets(model, texts, np.ones((1, 9))) == expected


def test_smaller_depths_have_their_share_of_the_loss() -> None:
    system, tokens = random_model(SHALLOW).requires_grad_(True).train(), random_tokens(2, 65)
    weights = {"full_weight": 0.3, "shallow_weight": 0.2, "floor_weight": 0.3, "lambda_info": 0.0}
    config = TrainingConfig(**weights, exit_weight=0.0, lambda_compute=0.0)
    reduced = Reduced(0.5, uniform=True, d_state=None, momentum=0.1, depth=2)
    loss = compute_loss(system, tokens, reduced, config)
    bits = loss.bits
    mixed = 0.3 * bits["full"] + 0.2 * bits["shallow"] + 0.3 * bits["floor"] + 0.2 * bits["reduced"]
    assert loss.total.item() / np.log(2.0) == pytest.approx(mixed, rel=1e-5)
    each = [
        torch.nn.functional.cross_entropy(system(tokens[:, :-1], depth=depth).flatten(0, 1), tokens[:, 1:].flatten())
        for depth in (1, 2)
    ]
    assert bits["shallow"] == pytest.approx(sum(one.item() for one in each) / 2 / np.log(2.0), rel=1e-5)
    ends = compute_loss(system, tokens, replace(reduced, rate=0.0, ends_only=True), config)
    mixed = (0.3 * bits["full"] + 0.2 * bits["shallow"] + 0.3 * bits["floor"]) / 0.8
    assert ends.total.item() / np.log(2.0) == pytest.approx(mixed, rel=1e-5)
    ends.total.backward()
    assert all(up.weight.grad.any() for up in system.router.shallow_up.values())


def test_reduced_passes_draw_depths_as_configured() -> None:
    drawn = [sample_reduced(TrainingConfig(shallow_share=0.4), SHALLOW, step).depth for step in range(2000)]
    assert [drawn.count(depth) / 2000 for depth in (1, 2, None)] == pytest.approx([0.2, 0.2, 0.6], abs=0.04)


def test_validation_scores_smaller_depths() -> None:
    system, tokens = random_model(SHALLOW), random_tokens(2, 65)
    scores = validate(system, tokens)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    bits = [
        torch.nn.functional.cross_entropy(system(inputs, depth=depth).flatten(0, 1), targets).item() / np.log(2.0)
        for depth in SHALLOW.depths
    ]
    assert scores["shallow"] == pytest.approx(sum(bits[:2]) / 2, rel=1e-5)
    assert scores["full"] == pytest.approx(bits[2], rel=1e-5)


def test_weights_that_leave_nothing_or_take_too_much_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"= 1\.1 must be at most 1"):
        TrainingConfig(full_weight=0.5, shallow_weight=0.3, floor_weight=0.3)
    with pytest.raises(ValidationError, match="must be above 0 where ends_share is"):
        TrainingConfig(full_weight=0.0, ends_share=0.5)
