"""Bytes at which the trunk does not run: compiled steps let its states read them later, and all at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.decoding import CODES_KEPT
from model.state import ModelState
from tests.model.shapes import PROPAGATING, random_model, random_tokens, without_compiled_code

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
SELDOM = torch.tensor([0.01, 0.02], dtype=torch.float64)


def copied(state: ModelState) -> ModelState:
    return state.map(torch.Tensor.clone)


@pytest.mark.parametrize("count", [2, CODES_KEPT + 1, CODES_KEPT + 2, 3 * CODES_KEPT + 5])
def test_states_that_read_late_are_those_that_read_at_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    model, tokens = random_model(PROPAGATING), random_tokens(2, count + 30)
    late, at_once = model.allocate_state(2), model.allocate_state(2)
    for column in tokens[:, :count].unbind(1):
        model.step(column, late, SELDOM)
        assert (late.router.waiting <= CODES_KEPT).all()
    assert late.router.waiting.any()  # the first byte fires
    without_compiled_code(monkeypatch)
    for column in tokens[:, :count].unbind(1):
        model.step(column, at_once, SELDOM)
    assert not at_once.router.waiting.any()
    monkeypatch.undo()
    before = [tensor.clone() for tensor in late.tensors()]
    settled = replace(late)
    model.settle(settled)
    assert not settled.router.waiting.any()
    assert all(torch.equal(one, other) for one, other in zip(before, late.tensors(), strict=True))
    for mine, other in zip(settled.trunk, at_once.trunk, strict=True):
        torch.testing.assert_close(mine.ssm_state, other.ssm_state, **CLOSE)
        torch.testing.assert_close(mine.conv_state, other.conv_state, **CLOSE)


def test_what_waits_survives_the_floor_and_passes() -> None:
    """Nothing is read at the floor; what came before it still is, by a step at full rate as by a pass."""
    model, tokens = random_model(PROPAGATING), random_tokens(2, 60)
    state = model.allocate_state(2)
    for rate, part in ((SELDOM, slice(0, 10)), (torch.zeros_like(SELDOM), slice(10, 20))):
        for column in tokens[:, part].unbind(1):
            model.step(column, state, rate)
    waited = state.router.waiting.tolist()
    assert min(waited) > 0
    assert max(waited) <= 10
    stepped, passed = copied(state), copied(state)
    logits = [model.step(column, stepped, torch.ones_like(SELDOM)).logits for column in tokens[:, 20:].unbind(1)]
    with torch.inference_mode():
        hidden = model.encode(tokens[:, 20:], passed.encoder).hidden
        expected = model.head(model.combine(hidden, None, passed))
    assert not stepped.router.waiting.any()
    torch.testing.assert_close(torch.stack(logits, 1), expected, atol=2e-4, rtol=2e-4)


def test_steps_by_tensor_operations_find_what_waits_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, full = random_model(PROPAGATING), random_tokens(2, 20), torch.ones_like(SELDOM)
    mixed, plain = model.allocate_state(2), model.allocate_state(2)
    for column in tokens[:, :10].unbind(1):
        model.step(column, mixed, SELDOM)
    assert mixed.router.waiting.any()
    without_compiled_code(monkeypatch)
    for column in tokens[:, :10].unbind(1):
        model.step(column, plain, SELDOM)
    for column in tokens[:, 10:].unbind(1):
        logits, expected = (model.step(column, state, full).logits for state in (mixed, plain))
        torch.testing.assert_close(logits, expected, **CLOSE)
