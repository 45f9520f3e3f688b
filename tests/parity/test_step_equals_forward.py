"""Reading byte by byte, block by block or all at once gives the same logits, at every budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.adaptive.tiling import Pace, TileManager
from model.config import ModelConfig
from tests.model.shapes import (
    OWN_DECODERS,
    PROPAGATING,
    SHALLOW,
    SMALL,
    UNMEASURED,
    random_model,
    random_tokens,
    step_through,
)

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
START = Pace(position=0, last_fire=0, fires=0, quota=0.0)


def fires_of(ends: list[int], length: int) -> torch.Tensor:
    fires = torch.zeros(1, length, dtype=torch.bool)
    fires[0, ends] = True
    return fires


SHAPES = pytest.mark.parametrize("shape", [SMALL, PROPAGATING], ids=["skips", "propagates"])


@SHAPES
@pytest.mark.parametrize("d_state", [None, 4])
@pytest.mark.parametrize("rate", [1.0, 0.7, 0.5, 0.25, 0.05, 0.0])
def test_stepping_equals_one_forward_pass(rate: float, d_state: int | None, shape: ModelConfig) -> None:
    model, tokens = random_model(shape), random_tokens(1, 150)
    logits, fires = step_through(model, tokens, torch.tensor([rate], dtype=torch.float64), d_state)
    assert fires.float().mean().item() == pytest.approx(rate, abs=0.2)
    torch.testing.assert_close(logits, model(tokens, fires, d_state=d_state), **CLOSE)


@pytest.mark.parametrize(
    "shape",
    [SHALLOW, SHALLOW.model_copy(update={"d_trunk": 48}), OWN_DECODERS],
    ids=["equal widths", "projected", "own decoders"],
)
@pytest.mark.parametrize("depth", SHALLOW.depths)
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.05])
def test_stepping_equals_one_forward_pass_at_every_depth(rate: float, depth: int, shape: ModelConfig) -> None:
    model, tokens = random_model(shape), random_tokens(1, 150)
    logits, fires = step_through(model, tokens, torch.tensor([rate], dtype=torch.float64), depth=depth)
    torch.testing.assert_close(logits, model(tokens, fires, depth=depth), **CLOSE)


@SHAPES
def test_rows_of_other_rates_and_state_sizes_step_as_in_one_pass(shape: ModelConfig) -> None:
    """Rows fire at different bytes, so a pass packs tiles of different numbers, and goes on from there."""
    model, tokens = random_model(shape), random_tokens(4, 120)
    lowest = 0.1 if shape.propagation_rank else 0.0  # at the floor states do not read on, and a pass is for all rows
    rates, columns = torch.tensor([1.0, 0.6, 0.2, lowest], dtype=torch.float64), torch.tensor([8, 16, 4, 16])
    stepped, passed = model.allocate_state(4), model.allocate_state(4)
    for state in (stepped, passed):
        model.resize_state_space(state, columns)
    outputs = [model.step(column, stepped, rates) for column in tokens.unbind(1)]
    fires = torch.stack([output.fired for output in outputs], 1)
    assert len(set(fires.sum(1).tolist())) == 4
    with torch.inference_mode():
        hidden = model.encode(tokens, passed.encoder).hidden
        logits = [
            model.head(model.combine(hidden[:, part], fires[:, part], passed))
            for part in (slice(0, 48), slice(48, 120))
        ]
    torch.testing.assert_close(torch.stack([output.logits for output in outputs], 1), torch.cat(logits, 1), **CLOSE)
    model.settle(stepped)
    for one, other in zip(stepped.trunk, passed.trunk, strict=True):
        torch.testing.assert_close(one.ssm_state, other.ssm_state, **CLOSE)
        torch.testing.assert_close(one.conv_state, other.conv_state, **CLOSE)


def test_a_resize_in_mid_sequence_is_the_same_for_steps_and_passes() -> None:
    model, tokens = random_model(), random_tokens(2, 96)
    rates, columns = torch.ones(2, dtype=torch.float64), torch.tensor([4, 8])
    stepped, passed = model.allocate_state(2), model.allocate_state(2)
    steps, logits = [], []
    with torch.inference_mode():
        hidden = model.encode(tokens, passed.encoder).hidden
        for start in (0, 48):
            steps += [model.step(column, stepped, rates).logits for column in tokens[:, start : start + 48].unbind(1)]
            logits.append(model.head(model.combine(hidden[:, start : start + 48], None, passed)))
            for state in (stepped, passed):
                model.resize_state_space(state, columns)
    assert stepped.trunk[0].ssm_state.shape[-1] == 8
    torch.testing.assert_close(torch.stack(steps, 1), torch.cat(logits, 1), **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"tied_head": False, "vocab_size": 300},
        {"dt_limits": (0.02, 0.06)},
        {"density_measured": False},
        {"propagation_rank": 3, "d_trunk": 32, "d_conv": 2},
    ],
)
def test_stepping_equals_a_pass_for_other_shapes(changes: dict) -> None:
    model, tokens = random_model(ModelConfig(**{**SMALL.model_dump(), **changes})), random_tokens(2, 60)
    logits, fires = step_through(model, tokens, torch.tensor([1.0, 0.4], dtype=torch.float64))
    torch.testing.assert_close(logits, model(tokens, fires), **CLOSE)
    assert logits.shape[-1] == model.config.vocab_size


@pytest.mark.parametrize("shape", [SMALL, UNMEASURED, PROPAGATING], ids=["measured", "unmeasured", "propagates"])
@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_stepping_fires_where_the_compiled_online_rule_fires(rate: float, shape: ModelConfig) -> None:
    model, tokens = random_model(shape), random_tokens(1, 400)
    _, fires = step_through(model, tokens, torch.tensor([rate], dtype=torch.float64))
    density = model.analyse(tokens)[0].numpy()
    assert model.tiles.online(density, rate, START).astype(bool).tolist() == fires[0].tolist()


@SHAPES
@pytest.mark.parametrize("rate", [1.0, 0.4, 0.1, 0.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_prefill_in_blocks_then_steps_equal_one_forward_pass(rate: float, length: int, shape: ModelConfig) -> None:
    model, tokens = random_model(shape), random_tokens(1, length + 40)
    state, ends = model.allocate_state(1), []
    for start in range(0, length, SMALL.block_size):
        piece = tokens[:, start : min(start + SMALL.block_size, length)]
        output = model.prefill(piece, state, rate, predict=start + piece.shape[1] == length)
        ends += [start + end for end in output.tile_ends]
    assert output.logits is not None
    rates = torch.tensor([rate], dtype=torch.float64)
    steps = [model.step(tokens[:, t], state, rates) for t in range(length, length + 40)]
    ends += [length + t for t, step in enumerate(steps) if step.fired.item()]
    expected = model(tokens, fires_of(ends, length + 40))[0]
    torch.testing.assert_close(output.logits, expected[length - 1], **CLOSE)
    torch.testing.assert_close(torch.cat([step.logits for step in steps]), expected[length:], **CLOSE)


@pytest.mark.parametrize("shape", [SMALL, UNMEASURED], ids=["measured", "unmeasured"])
def test_density_does_not_depend_on_how_the_text_was_cut(shape: ModelConfig) -> None:
    model, tokens = random_model(shape), random_tokens(1, 200)
    whole, state, parts = model.analyse(tokens), model.allocate_state(1), []
    with torch.inference_mode():
        for piece in tokens.split(64, dim=1):
            encoded = model.encode(piece, state.encoder)
            before = state.density
            features, state.density = model.features(encoded, before)
            state.encoder = encoded.states
            parts.append(torch.from_numpy(model.density.smooth(model.density.combine(features), before, state.density)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


@SHAPES
@pytest.mark.parametrize("rate", [1.0, 0.6, 0.1, 0.0])
@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_a_scored_prompt_has_the_logits_and_fires_of_stepping(rate: float, length: int, shape: ModelConfig) -> None:
    model, tokens = random_model(shape), random_tokens(1, length + 20)
    rates = torch.tensor([rate], dtype=torch.float64)
    expected, fires = step_through(model, tokens, rates)
    state, logits, ends = model.allocate_state(1), [], []
    for start in range(0, length, SMALL.block_size):
        output = model.prefill(tokens[:, start : min(start + SMALL.block_size, length)], state, rate, score=True)
        assert output.logits is not None
        logits.append(output.logits)
        ends += [start + end for end in output.tile_ends]
    torch.testing.assert_close(torch.cat(logits), expected[0, :length], **CLOSE)
    assert ends == fires[0, :length].nonzero().squeeze(-1).tolist()
    after = torch.cat([model.step(tokens[:, t], state, rates).logits for t in range(length, length + 20)])
    torch.testing.assert_close(after, expected[0, length:], **CLOSE)


def test_a_short_last_piece_that_fires_everywhere_still_knows_how_long_its_tile_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = random_model(), random_tokens(1, 65)
    monkeypatch.setattr(TileManager, "plan", lambda self, density, rate, pace: (np.arange(len(density)) % 64 == 0) * 1)
    state = model.allocate_state(1)
    model.prefill(tokens[:, :64], state, 0.5)
    output = model.prefill(tokens[:, 64:], state, 0.5)
    assert output.tile_ends == [0]
    assert output.logits is not None
    torch.testing.assert_close(output.logits, model(tokens, fires_of([0, 64], 65))[0, -1], **CLOSE)
