"""Reading byte by byte, block by block or all at once gives the same logits, at every budget."""

from __future__ import annotations

import pytest
import torch

from model.adaptive.tiling import Pace
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
    density = model.analyse(tokens)[0].numpy()
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
            before = state.density
            features, state.density = model.density(model.exit_head(encoded.hidden), encoded.trace, before)
            state.encoder = encoded.states
            parts.append(torch.from_numpy(model.density.smooth(model.density.combine(features), before, state.density)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
