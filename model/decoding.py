"""One decoding step of the assembled model: by tensor operations on any device, and by compiled loops on a CPU.

The two do the same, line by line. On a CPU a step of a small model is dominated by the overhead of its many tiny tensor
operations, so the fast one works on numpy views of the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from model.adaptive.controller import advance, fire_step
from model.adaptive.density import InformationDensityAnalyzer
from model.adaptive.router import CrossScaleRouter
from model.adaptive.tiling import TileManager
from model.config import ModelConfig
from model.layers.mamba2 import AdaptiveMambaBlock
from model.layers.norm import RMSNorm
from model.ops.recurrent import decode_rows, encode_rows, norm_rows, project_rows, read_waiting
from model.ops.ssd import StepTrace
from model.ops.words import NO_MATRIX, Matrix, readable
from model.state import BlockState, ModelState

_NOTHING = np.empty((0, 0), np.float32)
_NO_TRACE = (_NOTHING, _NOTHING, _NOTHING, _NOTHING, np.empty(0))

CODES_KEPT = 16
"""Bytes that the trunk's states put off reading. A fire finds few at most rates; more would only make states larger."""


class System(Protocol):
    """The parts of an :class:`~model.lm.AdaptiveAttentionSystem`."""

    config: ModelConfig
    embedding: nn.Embedding
    encoder: nn.ModuleList
    trunk: nn.ModuleList
    decoder: nn.ModuleList
    density: InformationDensityAnalyzer
    tiles: TileManager
    router: CrossScaleRouter
    exit_norm: RMSNorm
    final_norm: RMSNorm
    training: bool

    @property
    def head_weight(self) -> Tensor:
        """[V, d_model] of both heads."""

    def views(self) -> SystemViews:
        """What compiled steps read."""


@dataclass(frozen=True, slots=True)
class SystemViews:
    """What compiled steps read of a system; arrays unless stated otherwise; most matrices with their words."""

    encoder: tuple[AdaptiveMambaBlock, ...]
    """The blocks themselves, which have views of their own."""
    trunk: tuple[AdaptiveMambaBlock, ...]
    decoder: tuple[AdaptiveMambaBlock, ...]
    embedding: Any
    """[V, d_model]."""
    head: Matrix
    """[V, d_model]."""
    exit_norm: tuple[Any, float]
    """Weight [d_model], epsilon."""
    final_norm: tuple[Any, float]
    down: Matrix
    """[d_trunk, d_model] of the router; empty where the widths are equal."""
    ups: tuple[Matrix, ...]
    """[d_model, d_trunk] for each depth, rising."""
    depths: Any
    """[D] blocks of the trunk that can run, rising."""
    raw_fading: Any
    """[d_model]."""
    code: Matrix
    """[r, d_model] of the router; empty where the trunk's states skip what it skips."""
    propagations: tuple[Matrix, ...]
    """[x B C | dt, r] of each block of the trunk; empty likewise."""
    trace_widths: tuple[int, ...]
    """Of the arrays of a trace but the last; none where the density measures nothing."""


def make_views(system: System) -> SystemViews:
    """Those of the parameters that a system on a CPU has now."""

    def array(weight: Tensor) -> Any:
        return weight.detach().numpy()

    def matrix(linear: nn.Linear | None) -> Matrix:
        return NO_MATRIX if linear is None else readable(linear.weight, frozen=not system.training)

    stacks = (system.encoder, system.trunk, system.decoder)
    encoder, trunk, decoder = (tuple(cast(AdaptiveMambaBlock, block) for block in stack) for stack in stacks)
    router = system.router
    read, last = [block.mixer.propagation for block in trunk], encoder[-1].mixer
    return SystemViews(
        encoder=encoder,
        trunk=trunk,
        decoder=decoder,
        embedding=array(system.embedding.weight),
        head=readable(system.head_weight, frozen=not system.training),
        exit_norm=(array(system.exit_norm.weight), system.exit_norm.eps),
        final_norm=(array(system.final_norm.weight), system.final_norm.eps),
        down=matrix(router.down),
        ups=tuple(matrix(cast(nn.Linear | None, up)) for up in router.ups()),
        depths=np.array(system.config.depths),
        raw_fading=array(router.raw_fading),
        code=matrix(router.code),
        propagations=tuple(matrix(one) for one in read),
        trace_widths=(last.d_state, last.d_state, last.heads, last.heads) if system.density.measured else (),
    )


class StepOutput(NamedTuple):
    """Result of reading one token per sequence."""

    logits: Tensor
    """[B, V]."""
    fired: Tensor
    """[B] bool: the trunk ran."""


def step_plain(system: System, tokens: Tensor, state: ModelState, rates: Tensor, rows: Tensor | None) -> StepOutput:
    """Read one token per sequence by tensor operations.

    Args:
        tokens: [n]. state: advanced in place; the blocks' of B sequences, the rest of those that take part.
        rates: [n] float64 fires per byte, 0 to 1. rows: [n] int64, where in the blocks' states they are; None for all.
    """
    rows = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
    router = state.router
    full = torch.full_like(rows, system.config.d_state)
    hidden, trace = _run(system.encoder, system.embedding(tokens), state.encoder, rows, None, full)
    fired = rates >= 1.0
    chosen = ((rates > 0.0) & ~fired).nonzero().squeeze(-1)
    if len(chosen):
        measured = system.density.measured
        logits = nn.functional.linear(system.exit_norm(hidden[chosen]), system.head_weight) if measured else None
        features, after = system.density.step(
            hidden[chosen], logits, trace.select(chosen), state.density.gather(chosen)
        )
        density = system.density.smooth_step(system.density.combine(features), after)
        state.density.scatter_(chosen, after)
        fired[chosen] = fire_step(
            density, rates[chosen], system.tiles.log_threshold(rates[chosen]), system.tiles.log_spread.exp(),
            system.tiles.inertia, system.tiles.tau, router.gather(chosen),
            (system.tiles.min_tile_size, system.tiles.max_tile_size),
        )  # fmt: skip
    index, read = fired.nonzero().squeeze(-1), chosen[~fired[chosen]]
    propagates = system.router.code is not None
    for depth in system.config.depths:
        blocks, states = system.trunk[:depth], state.trunk[:depth]
        some = read[state.depth[read] == depth]
        if propagates and len(some):
            codes = system.router.propagated(hidden[some])
            for block, block_state in zip(blocks, states, strict=True):
                cast(AdaptiveMambaBlock, block).mixer.propagate(codes, block_state, rows[some], state.columns[some])
        some = index[state.depth[index] == depth]
        if len(some):
            entered = system.router.to_trunk(hidden[some])
            age = router.positions[some] + 1 - router.last_fire[some]
            stretch = None if propagates else age.to(hidden.dtype)
            left, _ = _run(blocks, entered, states, rows[some], stretch, state.columns[some])
            router.held.index_copy_(0, some, system.router.from_trunk(left - entered, depth))
    advance(router, fired, rates)
    output = hidden + system.router.fade(router.held, router.positions - router.last_fire)
    if len(system.decoder):
        output, _ = _run(system.decoder, output, state.decoder, rows, None, full)
    return StepOutput(nn.functional.linear(system.final_norm(output), system.head_weight), fired)


def _run(
    blocks: nn.ModuleList,
    hidden: Tensor,
    states: tuple[BlockState, ...],
    rows: Tensor,
    stretch: Tensor | None,
    columns: Tensor,
) -> tuple[Tensor, StepTrace]:
    """A stack of at least one block; the last one's trace."""
    for block, state in zip(blocks, states, strict=True):
        assert isinstance(block, AdaptiveMambaBlock)
        hidden, trace = block.step(hidden, state, rows, stretch, columns)
    return hidden, trace


def step_compiled(system: System, tokens: Tensor, state: ModelState, rates: Tensor, rows: Tensor | None) -> StepOutput:
    """The same on a CPU, for all of a batch where ``rows`` is None; a row has the same bits whoever stands beside it.

    Two compiled calls: what happens in the interpreter is slow, since the weights have pushed it out of the caches.
    """
    views, router = system.views(), state.router
    wanted = rates.numpy()
    places = _all_rows(len(wanted)) if rows is None else rows.numpy()
    fired = wanted >= 1.0
    chosen = ((wanted > 0.0) & ~fired).nonzero()[0]
    # Whoever is analysed: loops that trace round otherwise than those that do not, and mates must change no bit.
    traced = len(views.trace_widths) > 0
    trace = _make_trace(views.trace_widths, len(places)) if traced else _NO_TRACE
    encoder = _with_states(views.encoder, state.encoder)
    read = tokens.contiguous().numpy()
    hidden = encode_rows(read, views.embedding, places, traced, trace, encoder)
    if len(chosen):
        outputs = hidden[chosen]
        logits = project_rows(norm_rows(outputs, *views.exit_norm), views.head) if traced else _NOTHING
        density = system.density.step_rows(outputs, logits, trace, state.density, chosen)
        fired[chosen] = system.tiles.fire_rows(density, wanted, router, chosen)
    later = _later(views, state)
    kept = (router.held, router.last_fire, router.fires, router.quota, router.positions, router.codes, router.waiting)
    logits = decode_rows(
        fired, wanted, hidden, places, state.columns.numpy(), state.depth.numpy(), views.depths, later,
        views.propagations, views.code, views.down, views.ups, views.raw_fading, *views.final_norm, views.head,
        *(value.numpy() for value in kept),
    )  # fmt: skip
    return StepOutput(torch.from_numpy(logits), torch.from_numpy(fired))


def read_codes(system: System, state: ModelState) -> None:
    """Let the trunk's states read what waits for them; both are advanced in place."""
    views, router = system.views(), state.router
    waiting = router.waiting.numpy()
    read_waiting(
        waiting.nonzero()[0], _all_rows(len(waiting)), state.columns.numpy(), state.depth.numpy(),
        router.codes.numpy(), waiting, _later(views, state), views.propagations,
    )  # fmt: skip


@lru_cache
def _all_rows(count: int) -> Any:
    return np.arange(count)


def _later(views: SystemViews, state: ModelState) -> tuple[tuple[Any, ...], ...]:
    """Trunk and decoder, with their states."""
    return _with_states(views.trunk, state.trunk) + _with_states(views.decoder, state.decoder)


def _with_states(blocks: tuple[AdaptiveMambaBlock, ...], states: tuple[BlockState, ...]) -> tuple[tuple[Any, ...], ...]:
    """What compiled steps read of blocks, and their states, which they advance."""
    return tuple((*block.views().step, *state.arrays()) for block, state in zip(blocks, states, strict=True))


def _make_trace(widths: tuple[int, ...], count: int) -> tuple[Any, ...]:
    """Room for the content of a :class:`~model.ops.ssd.StepTrace` of so many rows."""
    return (*(np.empty((count, width), np.float32) for width in widths), np.empty(count))
