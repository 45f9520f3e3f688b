"""The compiled loops of a decoding step against their plain twins."""

from __future__ import annotations

import copy

import pytest
import torch

from model.adaptive.controller import advance, fire_step
from model.adaptive.density import state_gradient
from model.config import ModelConfig
from model.ops.features import density_rows
from model.ops.recurrent import decode_rows, encode_rows
from model.ops.tiling import fire_rows
from tests.model.shapes import (
    PROPAGATING,
    SMALL,
    UNMEASURED,
    encode_one,
    random_model,
    random_tokens,
    step_through,
    without_compiled_code,
)


@pytest.mark.parametrize("shape", [SMALL, UNMEASURED], ids=["measured", "unmeasured"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_compiled_density_and_its_state_equal_the_plain_ones(batch: int, shape: ModelConfig) -> None:
    model, tokens = random_model(shape), random_tokens(batch, 40)
    rows = torch.arange(0, batch, 2)
    state, plain = model.allocate_state(batch), model.allocate_state(batch).density.gather(rows)
    with torch.inference_mode():
        for column in tokens.unbind(1):
            hidden, trace = encode_one(model, column, state)
            exit_logits = model.exit_head(hidden[rows])
            arrays = [value.numpy() for value in (trace.B, trace.C, trace.dt, trace.log_decay, trace.change)]
            outputs = hidden[rows]
            compiled = model.density.step_rows(
                outputs.numpy(), exit_logits.numpy(), arrays, state.density, rows.numpy()
            )
            features, plain = model.density.step(outputs, exit_logits, trace.select(rows), plain)
            smoothed = model.density.smooth_step(model.density.combine(features), plain)
            torch.testing.assert_close(torch.from_numpy(compiled), smoothed, atol=1e-5, rtol=2e-4)
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
        compiled = model.tiles.fire_rows(density.numpy(), rates.numpy(), router, rows.numpy())
        part = router.gather(rows)
        log_threshold = model.tiles.log_threshold(rates[rows])
        plain = fire_step(
            density, rates[rows], log_threshold, model.tiles.log_spread.exp(), model.tiles.inertia, model.tiles.tau,
            part, (1, 64),
        )  # fmt: skip
        assert compiled.tolist() == plain.tolist()
        count += int(plain.sum())
        advance(part, plain, rates[rows])
        router.scatter_(rows, part)
    assert 300 < count < 900


@pytest.mark.parametrize("shape", [SMALL, PROPAGATING], ids=["skips", "propagates"])
def test_every_batch_size_runs_the_same_compiled_code(shape: ModelConfig) -> None:
    """Another memory layout would compile anew, and stall the server for seconds."""
    model, compiled = random_model(shape), []
    for batch in (1, 2, 3, 4, 9):
        state = model.allocate_state(batch)
        for column in random_tokens(batch, 3).unbind(1):
            model.step(column, state, torch.full((batch,), 0.5, dtype=torch.float64))
        compiled.append([len(f.signatures) for f in (density_rows, fire_rows, encode_rows, decode_rows)])
    assert min(compiled[0]) > 0
    assert compiled == [compiled[0]] * 5


def test_a_copy_of_a_model_runs_its_own_weights() -> None:
    """The compiled loops read views of the parameters, which must not be those of the original."""
    model, tokens, rates = random_model(), random_tokens(1, 20), torch.ones(1, dtype=torch.float64)
    before, _ = step_through(model, tokens, rates)
    other = copy.deepcopy(model)
    assert torch.equal(step_through(other, tokens, rates)[0], before)
    other.trunk[0].mixer.D.add_(1.0)
    other.eval()
    assert not torch.equal(step_through(other, tokens, rates)[0], before)
    assert torch.equal(step_through(model, tokens, rates)[0], before)


@pytest.mark.parametrize("shape", [SMALL, PROPAGATING], ids=["skips", "propagates"])
def test_a_step_without_compiled_code_is_the_same_step(monkeypatch: pytest.MonkeyPatch, shape: ModelConfig) -> None:
    """What other devices run, run here."""
    model, tokens = random_model(shape), random_tokens(4, 80)
    rates = torch.tensor([0.5, 1.0, 0.1, 0.0], dtype=torch.float64)
    compiled = step_through(model, tokens, rates)
    without_compiled_code(monkeypatch)
    plain = step_through(model, tokens, rates)
    assert torch.equal(plain[1], compiled[1])
    torch.testing.assert_close(plain[0], compiled[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 15, 16, 50])
@pytest.mark.parametrize("columns", [None, [16, 4, 8]])
def test_the_compiled_mixer_is_the_plain_one(
    length: int, columns: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = random_model().trunk[0]
    state = block.mixer.zero_state(3, torch.device("cpu"))
    torch.manual_seed(length)
    options = {"columns": None if columns is None else torch.tensor(columns)}
    lengths = torch.tensor([length, length // 2, 0])
    results = []
    for plain in (False, True):
        if plain:
            without_compiled_code(monkeypatch)
        torch.manual_seed(length)
        with torch.no_grad():
            first = torch.randn(3, 20, block.mixer.width)
            _, now, _ = block(first, state, torch.full((3, 20), 2.0), **options)
            kept = now.map(torch.clone)
            hidden, stretch = torch.randn(3, length, block.mixer.width), torch.randint(1, 9, (3, length)).float()
            output, after, trace = block(hidden, now, stretch, lengths=lengths, **options)
        for given, before in zip(now.tensors(), kept.tensors(), strict=True):
            assert torch.equal(given, before), "the state that was given is not changed"
        for passed, before in zip(after.tensors(), kept.tensors(), strict=True):
            assert torch.equal(passed[2], before[2]), "padding leaves a state alone"
        counts = torch.arange(length) < lengths.unsqueeze(1)
        results.append([output[counts], *after.tensors(), trace.x[counts], trace.B[counts], trace.C[counts], trace.dt])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


def test_the_change_of_the_state_measured_on_the_way_is_the_one_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    block, hidden = random_model().encoder[0], torch.randn(2, 90, SMALL.d_model)
    found = []
    for plain in (False, True):
        if plain:
            without_compiled_code(monkeypatch)
        with torch.no_grad():
            _, state, _ = block(hidden[:, :30], block.mixer.zero_state(2, hidden.device))
            _, _, trace = block(hidden[:, 30:], state)
        found.append(trace)
    measured, formula = found
    assert formula.change is None
    expected = state_gradient(formula, SMALL.chunk_size)
    torch.testing.assert_close(measured.change.sqrt().log1p().float(), expected, atol=1e-4, rtol=1e-4)
    assert expected.max() > 0.1
