"""A sequence gets bitwise the same logits and fires whoever runs beside it."""

from __future__ import annotations

import pytest
import torch

from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.state import ModelState
from tests.model.shapes import (
    OWN_DECODERS,
    PROPAGATING,
    SHALLOW,
    SMALL,
    random_model,
    random_tokens,
    settled,
    step_through,
    without_compiled_code,
)

RATES = torch.tensor([1.0, 0.0, 0.5, 0.1, 0.9, 0.02, 0.3, 1.0, 0.05], dtype=torch.float64)


@pytest.fixture(params=["skips", "propagates", "embedded"])
def model(request: pytest.FixtureRequest) -> AdaptiveAttentionSystem:
    if request.param == "embedded":
        return load_checkpoint(EMBEDDED_CHECKPOINT)
    return random_model(PROPAGATING if request.param == "propagates" else SMALL)


def test_mates_of_other_budgets_change_nothing(model: AdaptiveAttentionSystem) -> None:
    tokens = random_tokens(len(RATES), 60)
    logits, fires = step_through(model, tokens, RATES)
    for row in range(len(RATES)):
        alone, fired = step_through(model, tokens[row : row + 1], RATES[row : row + 1])
        assert torch.equal(alone[0], logits[row]), f"row {row} at rate {RATES[row]}"
        assert torch.equal(fired[0], fires[row])


@pytest.mark.parametrize("level", [0, 1, 2])
def test_mates_of_other_state_sizes_change_nothing(model: AdaptiveAttentionSystem, level: int) -> None:
    """A batch is as wide as its widest row needs; a narrow row must not notice."""
    levels, tokens = model.config.d_state_levels, random_tokens(5, 60)
    rates = torch.tensor([1.0, 0.5, 1.0, 0.3, 0.9], dtype=torch.float64)
    width, state = levels[level], model.allocate_state(5)
    model.resize_state_space(state, torch.tensor([levels[2], width, levels[0], levels[1], width]))
    logits = torch.stack([model.step(column, state, rates).logits for column in tokens.unbind(1)], 1)
    for row in (1, 4):
        alone, _ = step_through(model, tokens[row : row + 1], rates[row : row + 1], d_state=width)
        assert torch.equal(alone[0], logits[row])


@pytest.mark.parametrize("shape", [SHALLOW, OWN_DECODERS], ids=["one decoder", "own decoders"])
@pytest.mark.parametrize("depth", SHALLOW.depths)
def test_mates_of_other_depths_change_nothing(depth: int, shape: ModelConfig) -> None:
    model, tokens = random_model(shape), random_tokens(7, 60)
    rates = torch.tensor([1.0, 0.5, 1.0, 0.3, 0.9, 0.02, 0.0], dtype=torch.float64)
    state = model.allocate_state(7)
    state.depth = torch.tensor([1, depth, 2, 3, depth, depth, 1])
    logits = torch.stack([model.step(column, state, rates).logits for column in tokens.unbind(1)], 1)
    for row in (1, 4, 5):
        alone, _ = step_through(model, tokens[row : row + 1], rates[row : row + 1], depth=depth)
        assert torch.equal(alone[0], logits[row])


def test_rows_that_do_not_take_part_do_not_change_and_change_nothing(model: AdaptiveAttentionSystem) -> None:
    tokens, random = random_tokens(len(RATES), 60), torch.Generator().manual_seed(0)
    logits, _ = step_through(model, tokens, RATES)
    state, read = model.allocate_state(len(RATES)), [0] * len(RATES)
    while min(read) < 60:
        rows = (torch.rand(len(RATES), generator=random) < 0.5).nonzero().squeeze(-1)
        rows = torch.tensor([row for row in rows.tolist() if read[row] < 60], dtype=torch.int64)
        column = torch.stack([tokens[row, read[row]] for row in rows.tolist()]) if len(rows) else tokens[:0, 0]
        if len(rows):
            output = model.step(column, state, RATES[rows], rows)
            for place, row in enumerate(rows.tolist()):
                assert torch.equal(output.logits[place], logits[row, read[row]])
                read[row] += 1


@pytest.mark.parametrize("shape", [SMALL, PROPAGATING], ids=["skips", "propagates"])
def test_some_rows_step_alike_by_tensor_operations(monkeypatch: pytest.MonkeyPatch, shape: ModelConfig) -> None:
    model, tokens, random = random_model(shape), random_tokens(len(RATES), 40), torch.Generator().manual_seed(1)
    steps = [torch.randperm(len(RATES), generator=random)[: 1 + place % len(RATES)] for place in range(40)]

    def run() -> tuple[list[torch.Tensor], ModelState]:
        state = model.allocate_state(len(RATES))
        outputs = [model.step(tokens[rows, place], state, RATES[rows], rows) for place, rows in enumerate(steps)]
        return [output.logits for output in outputs], settled(model, state)

    compiled_logits, compiled_state = run()
    without_compiled_code(monkeypatch)
    logits, state = run()
    for mine, other in zip(logits, compiled_logits, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    for mine, other in zip(state.tensors(), compiled_state.tensors(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_the_order_of_the_batch_changes_nothing(model: AdaptiveAttentionSystem) -> None:
    tokens, order = random_tokens(len(RATES), 40), torch.randperm(len(RATES))
    logits, fires = step_through(model, tokens, RATES)
    shuffled, fired = step_through(model, tokens[order], RATES[order])
    assert torch.equal(shuffled, logits[order])
    assert torch.equal(fired, fires[order])
