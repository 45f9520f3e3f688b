"""Runs of tiles at different state sizes within one sequence: read in pieces as in steps, wherever a run begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.adaptive.resolution import region_density, region_resolutions
from model.lm import AdaptiveAttentionSystem
from tests.model.shapes import SHALLOW, SMALL, random_model, random_tokens
from tests.parity.test_any_reading import CLOSE, assert_same_state

MODEL, STAGES = random_model(), random_model(SHALLOW)
BLOCK, LEVELS = SMALL.block_size, SMALL.d_state_levels


def assert_reading_equals_stepping(
    tokens: torch.Tensor, rate: float, sizes: list[tuple[int, int]], model: AdaptiveAttentionSystem = MODEL
) -> None:
    """Scored pieces of a block, each with the runs that begin in it, against steps with a resize before each run."""
    read, stepped = model.allocate_state(1), model.allocate_state(1)
    logits, ends = [], []
    for start in range(0, tokens.shape[1], BLOCK):
        text = tokens[:, start : start + BLOCK]
        here = [(offset - start, size) for offset, size in sizes if start <= offset < start + text.shape[1]]
        output = model.prefill(text, read, rate, score=True, sizes=here)
        logits.append(output.logits)
        ends += [start + end for end in output.tile_ends]
    starts, expected, fires = dict(sizes), [], []
    for position, column in enumerate(tokens.unbind(1)):
        if position in starts:
            model.resize_state_space(stepped, starts[position])
        step = model.step(column, stepped, torch.tensor([rate], dtype=torch.float64))
        expected.append(step.logits)
        fires.append(bool(step.fired))
    assert ends == np.flatnonzero(fires).tolist()
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected), **CLOSE)
    assert torch.equal(read.columns, stepped.columns)
    assert_same_state(model, read, stepped, density=True)


@pytest.mark.parametrize("model", [MODEL, STAGES], ids=["one stage", "stages"])
@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (1, [(0, 4)]),
        (50, [(0, 8), (1, 16)]),
        (50, [(3, 4), (20, 16), (21, 8)]),
        (50, [(10, 4), (49, 8)]),
        (BLOCK + 30, [(BLOCK - 1, 4), (BLOCK + 1, 16)]),
        (BLOCK + 30, [(BLOCK, 8)]),
    ],
    ids=["one byte", "first tile", "inside", "short last tile", "tile across pieces", "where a piece begins"],
)
def test_runs_of_tiles_at_their_own_size(
    path: str, rate: float, length: int, sizes: list[tuple[int, int]], model: AdaptiveAttentionSystem
) -> None:
    assert_reading_equals_stepping(random_tokens(1, length), rate, sizes, model)


def test_dense_regions_keep_their_columns(path: str) -> None:
    """Levels chosen by region from the density, and read so."""
    tokens, window = random_tokens(1, 2 * BLOCK), 16
    density = region_density(MODEL.analyse(tokens)[0].numpy(), window)
    costs, losses = np.array(LEVELS, float), 1.0 / np.array(LEVELS)
    levels = region_resolutions(density, costs, losses, 0.6 * costs[-1] * len(density))
    assert len(set(levels.tolist())) > 1
    assert levels[density.argmax()] == levels.max()
    sizes = [(region * window, LEVELS[level]) for region, level in enumerate(levels)]
    assert_reading_equals_stepping(tokens, 0.5, sizes)


@pytest.mark.parametrize("sizes", [[(-1, 4)], [(5, 4), (5, 8)], [(9, 4), (2, 8)], [(20, 4)]])
def test_offsets_that_do_not_rise_inside_the_piece_are_refused(sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="offsets that rise"):
        MODEL.prefill(random_tokens(1, 20), MODEL.allocate_state(1), 1.0, sizes=sizes)
