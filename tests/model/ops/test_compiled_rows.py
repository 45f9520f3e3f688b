"""The compiled loops of a decoding step against their plain twins."""

from __future__ import annotations

import pytest
import torch

from model.adaptive.controller import advance, fire_step
from model.lm import AdaptiveAttentionSystem
from model.ops.features import features_rows
from model.ops.ssd import ScanTrace
from model.ops.tiling import fire_rows
from model.state import ModelState
from tests.model.shapes import random_model, random_tokens, step_through


def encode_one(
    model: AdaptiveAttentionSystem, column: torch.Tensor, state: ModelState
) -> tuple[torch.Tensor, ScanTrace]:
    """One position through the encoder, whose state is replaced."""
    hidden, after = model.embedding(column), []
    for block, block_state in zip(model.encoder, state.encoder, strict=True):
        update, new, trace = block.step(hidden, block_state)
        hidden = hidden + update
        after.append(new)
    state.encoder = tuple(after)
    return hidden, trace


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_compiled_density_and_its_state_equal_the_plain_ones(batch: int) -> None:
    model, tokens = random_model(), random_tokens(batch, 40)
    rows = torch.arange(0, batch, 2)
    state, plain = model.allocate_state(batch), model.allocate_state(batch).density.gather(rows)
    for column in tokens.unbind(1):
        hidden, trace = encode_one(model, column, state)
        exit_logits = model.exit_head(hidden[rows])
        compiled = model.density.step_rows(exit_logits, trace, state.density, rows)
        part = ScanTrace(*(value if value is trace.A else value[rows] for value in (
            trace.x, trace.dt, trace.A, trace.B, trace.C, trace.before, trace.after)))  # fmt: skip
        features, plain = model.density.step(exit_logits, part, plain)
        torch.testing.assert_close(compiled.float(), model.density.combine(features), atol=1e-5, rtol=2e-4)
    for mine, other in zip(state.density.gather(rows).tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)
    others = torch.arange(1, batch, 2)
    assert not any(tensor[others].any() for tensor in state.density.tensors())


def test_the_compiled_rule_fires_where_the_plain_one_does() -> None:
    model, router = random_model(), random_model().allocate_state(5).router
    rates = torch.tensor([0.9, 0.01, 0.3, 0.05, 0.5], dtype=torch.float64)
    rows = torch.tensor([0, 1, 3, 4])
    densities = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)).double() ** 3
    count = 0
    for density in densities:
        compiled = model.tiles.fire_rows(density, rates, router, rows)
        part = router.gather(rows)
        log_threshold = model.tiles.log_threshold(rates[rows])
        plain = fire_step(density, rates[rows], log_threshold, model.tiles.tau, part, (1, 64))
        assert torch.equal(compiled, plain)
        count += int(plain.sum())
        advance(part, plain, rates[rows])
        router.scatter_(rows, part)
    assert 300 < count < 900


def test_every_batch_size_runs_the_same_compiled_code() -> None:
    """Another memory layout would compile anew, and stall the server for seconds."""
    model = random_model()
    for batch in (1, 2, 3, 4, 9):
        state = model.allocate_state(batch)
        for column in random_tokens(batch, 3).unbind(1):
            model.step(column, state, torch.full((batch,), 0.5, dtype=torch.float64))
    assert len(features_rows.signatures) == len(fire_rows.signatures) == 1


def test_a_step_without_compiled_code_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other devices run, run here."""
    model, tokens = random_model(), random_tokens(4, 80)
    rates = torch.tensor([0.5, 1.0, 0.1, 0.0], dtype=torch.float64)
    compiled = step_through(model, tokens, rates)
    monkeypatch.setattr(AdaptiveAttentionSystem, "_decide_compiled", AdaptiveAttentionSystem._decide)
    plain = step_through(model, tokens, rates)
    assert torch.equal(plain[1], compiled[1])
    assert torch.equal(plain[0], compiled[0])
