"""Whatever pieces a text is read in, at whatever budgets, state sizes and depths by turns: the logits of stepping.

Hypothesis chooses the pieces. Stepping knows nothing of pieces, chunks or packed tiles, so it is the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.state import ModelState
from tests.model.shapes import OWN_DECODERS, PROPAGATING, SHALLOW, SMALL, random_model, random_tokens, settled

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
SKIPS, PROPAGATES = random_model(), random_model(PROPAGATING)
ENDS_EARLY, OWN = random_model(SHALLOW), random_model(OWN_DECODERS)
SKIPS.tiles.log_tau.fill_(math.log(0.3))  # stale at once, so that the trunk fires in stretches, as trained models do
MODELS = st.sampled_from([SKIPS, PROPAGATES, ENDS_EARLY, OWN])
BLOCK, CHUNK = SMALL.block_size, SMALL.chunk_size


@dataclass(frozen=True)
class Piece:
    """Some consecutive bytes, the fire rate at which they are read, and the state size and depth of the trunk."""

    length: int
    rate: float
    columns: int
    depth: int
    """Of those that the model has."""

    def prepare(self, model: AdaptiveAttentionSystem, state: ModelState) -> None:
        """Set a state's size and depth."""
        model.resize_state_space(state, self.columns)
        model.set_depth(state, model.config.depths[self.depth % len(model.config.depths)])


def pieces(lengths: st.SearchStrategy[int], most: int) -> st.SearchStrategy[list[Piece]]:
    rates = st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.9, 1.0])
    piece = st.builds(Piece, lengths, rates, st.sampled_from(SMALL.d_state_levels), st.integers(0, 2))
    return st.lists(piece, min_size=1, max_size=most)


def walk(
    model: AdaptiveAttentionSystem, tokens: torch.Tensor, parts: list[Piece], state: ModelState
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [L, V] and fires [L] of stepping through the pieces one byte at a time."""
    outputs = []
    for part, text in zip(parts, tokens.split([part.length for part in parts], dim=1), strict=True):
        part.prepare(model, state)
        rate = torch.tensor([part.rate], dtype=torch.float64)
        outputs += [model.step(column, state, rate) for column in text.unbind(1)]
    return torch.cat([output.logits for output in outputs]), torch.cat([output.fired for output in outputs])


def assert_same_state(model: AdaptiveAttentionSystem, one: ModelState, other: ModelState, *, density: bool) -> None:
    one, other = settled(model, one), settled(model, other)
    for name in ("encoder", "trunk", "decoder", "router", *(["density"] if density else [])):
        values = [getattr(state, name) for state in (one, other)]
        rows = [value if isinstance(value, tuple) else (value,) for value in values]
        for mine, others in zip(*rows, strict=True):
            for a, b in zip(mine.tensors(), others.tensors(), strict=True):
                torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=30)
@given(model=MODELS, parts=pieces(st.integers(1, BLOCK), 5), seed=st.integers(0, 20))
def test_scored_pieces_of_any_length_equal_stepping(
    path: str, model: AdaptiveAttentionSystem, parts: list[Piece], seed: int
) -> None:
    """The causal rule decides alike too, across pieces, changes of budget and resizes: quota, age, density carried."""
    tokens = random_tokens(1, sum(part.length for part in parts), seed)
    stepped, read = model.allocate_state(1), model.allocate_state(1)
    expected, fires = walk(model, tokens, parts, stepped)
    logits, ends, done = [], [], 0
    for part, text in zip(parts, tokens.split([part.length for part in parts], dim=1), strict=True):
        part.prepare(model, read)
        output = model.prefill(text, read, part.rate, score=True)
        logits.append(output.logits)
        ends += [done + end for end in output.tile_ends]
        done += part.length
    assert ends == fires.nonzero().squeeze(-1).tolist()
    torch.testing.assert_close(torch.cat(logits), expected, **CLOSE)
    assert_same_state(model, read, stepped, density=True)


@settings(max_examples=30)
@given(
    model=MODELS, blocks=pieces(st.just(BLOCK), 3), tail=pieces(st.integers(1, BLOCK), 1),
    after=pieces(st.integers(1, 30), 3), seed=st.integers(0, 20),
)  # fmt: skip
def test_planned_blocks_then_steps_equal_passes_over_the_same_tiles(
    path: str,
    model: AdaptiveAttentionSystem,
    blocks: list[Piece],
    tail: list[Piece],
    after: list[Piece],
    seed: int,
) -> None:
    """A prompt in blocks, re-tiled and resized between them, goes on in steps; a pass gets the tiles that came out."""
    prompt = blocks + tail
    parts = prompt + after
    lengths = [part.length for part in parts]
    texts = random_tokens(1, sum(lengths), seed).split(lengths, dim=1)
    read, passed = model.allocate_state(1), model.allocate_state(1)
    for index, (part, text) in enumerate(zip(parts, texts, strict=True)):
        for state in (read, passed):
            part.prepare(model, state)
        fires = torch.zeros(1, part.length, dtype=torch.bool)
        if index < len(prompt):
            output = model.prefill(text, read, part.rate)
            fires[0, output.tile_ends] = True
            logits = output.logits.unsqueeze(0)
        else:
            rate = torch.tensor([part.rate], dtype=torch.float64)
            outputs = [model.step(column, read, rate) for column in text.unbind(1)]
            fires = torch.stack([step.fired for step in outputs], 1)
            logits = torch.cat([step.logits for step in outputs])
        encoded = model.encode(text, passed.encoder)
        passed.encoder = encoded.states
        expected = model.head(model.combine(encoded.hidden, fires, passed, propagate=part.rate > 0.0))[0]
        torch.testing.assert_close(logits, expected[-len(logits) :], **CLOSE)
        passed.router.quota += part.rate * part.length
    assert_same_state(model, read, passed, density=False)


@settings(max_examples=30)
@given(model=MODELS, cuts=st.sets(st.integers(1, 15), max_size=6), rate=st.sampled_from([0.1, 0.5, 1.0]))
def test_a_pass_cut_at_any_chunks_is_the_whole_pass(
    path: str, model: AdaptiveAttentionSystem, cuts: set[int], rate: float
) -> None:
    length = 16 * CHUNK
    tokens = random_tokens(2, length)
    fires = torch.rand(2, length, generator=torch.Generator().manual_seed(len(cuts))) < rate
    expected = model(tokens, fires)
    bounds = [0, *(cut * CHUNK for cut in sorted(cuts)), length]
    state, logits = model.allocate_state(2), []
    for start, end in pairwise(bounds):
        encoded = model.encode(tokens[:, start:end], state.encoder)
        state.encoder = encoded.states
        logits.append(model.head(model.combine(encoded.hidden, fires[:, start:end], state)))
    torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)


@pytest.mark.parametrize("shape", [SMALL, PROPAGATING], ids=["skips", "propagates"])
@pytest.mark.parametrize("length", [1, 511, 512, 513, 100_000])
def test_texts_around_a_block_and_very_long_ones(path: str, length: int, shape: ModelConfig) -> None:
    """Blocks of 512 bytes at a low budget against one pass over the whole text."""
    model = random_model(ModelConfig(**{**shape.model_dump(), "block_size": 512, "chunk_size": 64}))
    tokens, state, fires = random_tokens(1, length), model.allocate_state(1), []
    for text in tokens.split(512, dim=1):
        output = model.prefill(text, state, 0.1)
        fired = torch.zeros(1, text.shape[1], dtype=torch.bool)
        fired[0, output.tile_ends] = True
        fires.append(fired)
    tiled = torch.cat(fires, 1)
    assert int(state.router.positions) == length
    assert abs(int(tiled.sum()) - 0.1 * length) <= max(12.0, 0.02 * length)
    whole = model.allocate_state(1)
    decoded = model.combine(model.encode(tokens, whole.encoder).hidden, tiled, whole)
    torch.testing.assert_close(output.logits, model.head(decoded[:, -1])[0], **CLOSE)
    for mine, other in zip(state.trunk + state.decoder, whole.trunk + whole.decoder, strict=True):
        torch.testing.assert_close(mine.ssm_state, other.ssm_state, **CLOSE)
