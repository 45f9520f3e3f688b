"""Reading byte by byte, block by block or all at once gives the same logits, at every budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.adaptive.tiling import Pace, TileManager
from tests.model.shapes import SMALL, random_model, random_tokens, step_through

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
START = Pace(position=0, last_fire=0, fires=0, quota=0.0)


def fires_of(ends: list[int], length: int) -> torch.Tensor:
    fires = torch.zeros(1, length, dtype=torch.bool)
    fires[0, ends] = True
    return fires


@pytest.mark.parametrize("d_state", [None, 4])
@pytest.mark.parametrize("rate", [1.0, 0.7, 0.5, 0.25, 0.05, 0.0])
def test_stepping_equals_one_forward_pass(rate: float, d_state: int | None) -> None:
    model, tokens = random_model(), random_tokens(1, 150)
    logits, fires = step_through(model, tokens, torch.tensor([rate], dtype=torch.float64), d_state)
    assert fires.float().mean().item() == pytest.approx(rate, abs=0.2)
    torch.testing.assert_close(logits, model(tokens, fires, d_state=d_state), **CLOSE)


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_stepping_fires_where_the_compiled_online_rule_fires(rate: float) -> None:
    model, tokens = random_model(), random_tokens(1, 400)
    _, fires = step_through(model, tokens, torch.tensor([rate], dtype=torch.float64))
    density = model.analyse(tokens)[0].double().numpy()
    assert model.tiles.online(density, rate, START).astype(bool).tolist() == fires[0].tolist()


@pytest.mark.parametrize("rate", [1.0, 0.4, 0.1, 0.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_prefill_in_blocks_then_steps_equal_one_forward_pass(rate: float, length: int) -> None:
    model, tokens = random_model(), random_tokens(1, length + 40)
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


def test_density_does_not_depend_on_how_the_text_was_cut() -> None:
    model, tokens = random_model(), random_tokens(1, 200)
    whole, state, parts = model.analyse(tokens), model.allocate_state(1), []
    with torch.inference_mode():
        for piece in tokens.split(64, dim=1):
            encoded = model.encode(piece, state.encoder)
            features, state.density = model.density(model.exit_head(encoded.hidden), encoded.trace, state.density)
            state.encoder = encoded.states
            parts.append(model.density.combine(features))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rate", [1.0, 0.6, 0.1, 0.0])
@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_a_scored_prompt_has_the_logits_and_fires_of_stepping(rate: float, length: int) -> None:
    model, tokens = random_model(), random_tokens(1, length + 20)
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
