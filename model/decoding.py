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
from model.ops.recurrent import decode_rows, encode_rows, enter_rows, norm_rows, project_rows, read_waiting
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
    density: InformationDensityAnalyzer
    tiles: TileManager
    router: CrossScaleRouter
    exit_norm: RMSNorm
    final_norm: RMSNorm
    training: bool

    def placements(self) -> list[tuple[InformationDensityAnalyzer, TileManager]]:
        """What places each stage of the trunk."""

    def decoders(self) -> list[nn.ModuleList]:
        """What follows the trunk: one for all stages, or one for each."""

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
    decoders: tuple[tuple[AdaptiveMambaBlock, ...], ...]
    """One for all stages of the trunk, or one for each."""
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
    """[d_model, d_trunk] for each stage of the trunk."""
    depths: Any
    """[S] blocks of the trunk after which each stage ends."""
    placements: tuple[tuple[InformationDensityAnalyzer, TileManager], ...]
    """What places each stage."""
    raw_fading: Any
    """[d_model]."""
    codes: tuple[Matrix, ...]
    """[r, d_model] for the first stage, [r, d_trunk] for others; empty where the trunk's states skip what it skips."""
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

    stacks = (system.encoder, system.trunk, *system.decoders())
    encoder, trunk, *decoders = (tuple(cast(AdaptiveMambaBlock, block) for block in stack) for stack in stacks)
    router = system.router
    read, last = [block.mixer.propagation for block in trunk], encoder[-1].mixer
    return SystemViews(
        encoder=encoder,
        trunk=trunk,
        decoders=tuple(decoders),
        embedding=array(system.embedding.weight),
        head=readable(system.head_weight, frozen=not system.training),
        exit_norm=(array(system.exit_norm.weight), system.exit_norm.eps),
        final_norm=(array(system.final_norm.weight), system.final_norm.eps),
        down=matrix(router.down),
        ups=tuple(matrix(cast(nn.Linear | None, up)) for up in router.ups()),
        depths=np.array(system.config.depths),
        raw_fading=array(router.raw_fading),
        placements=tuple(system.placements()),
        codes=tuple(matrix(cast(nn.Linear, code)) for code in router.codes()) or (NO_MATRIX,),
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
    fired, outer = rates >= 1.0, hidden.clone()
    for stage, depth in enumerate(system.config.depths):
        of_stage = (state.depth == depth).nonzero().squeeze(-1)
        if len(of_stage):
            _step_stage(system, stage, of_stage, hidden, trace, state, rates, rows, fired, outer)
    advance(router, fired, rates)
    output = outer + system.router.fade(router.held, router.positions - router.last_fire)
    decoders = system.decoders()
    for decoder, depth in zip(decoders, system.config.depths, strict=False):
        some = (torch.ones_like(fired) if len(decoders) == 1 else state.depth == depth).nonzero().squeeze(-1)
        if len(decoder) and len(some):
            read, _ = _run(decoder, output[some], state.decoder, rows[some], None, full[some])
            output = output.index_copy(0, some, read)
    return StepOutput(nn.functional.linear(system.final_norm(output), system.head_weight), fired)


def _step_stage(
    system: System,
    stage: int,
    index: Tensor,
    hidden: Tensor,
    trace: StepTrace,
    state: ModelState,
    rates: Tensor,
    rows: Tensor,
    fired: Tensor,
    outer: Tensor,
) -> None:
    """The trunk of the rows ``index`` [k] that are placed in ``stage``; what runs at all of them is added to ``outer``.

    Args:
        hidden: [n, d_model] encoder outputs, with their trace. fired: [n] bool, set where the stage runs. All others as
            in :func:`step_plain`.
    """
    router, depths, start = state.router, system.config.depths, 0
    inputs = hidden[index]
    for lower, end in enumerate(depths[:stage]):
        entered = inputs if lower else system.router.to_trunk(inputs)
        inputs, _ = _run(
            system.trunk[start:end], entered, state.trunk[start:end], rows[index], None, state.columns[index]
        )
        outer.index_add_(0, index, system.router.from_trunk(inputs - entered, lower))
        start = end
    between = ((rates > 0.0) & (rates < 1.0))[index].nonzero().squeeze(-1)
    if len(between):
        chosen, (analyzer, tiles) = index[between], system.placements()[stage]
        logits = (
            nn.functional.linear(system.exit_norm(inputs[between]), system.head_weight) if analyzer.measured else None
        )
        features, after = analyzer.step(inputs[between], logits, trace.select(chosen), state.density.gather(chosen))
        density = analyzer.smooth_step(analyzer.combine(features), after)
        state.density.scatter_(chosen, after)
        fired[chosen] = fire_step(
            density, rates[chosen], tiles.log_threshold(rates[chosen]), tiles.log_spread.exp(), tiles.inertia,
            tiles.tau, router.gather(chosen), (tiles.min_tile_size, tiles.max_tile_size),
        )  # fmt: skip
    blocks, states = system.trunk[start : depths[stage]], state.trunk[start : depths[stage]]
    propagates = system.router.code is not None
    skipping = between[~fired[index[between]]]
    if propagates and len(skipping):
        some, codes = index[skipping], system.router.propagated(inputs[skipping], stage)
        for block, block_state in zip(blocks, states, strict=True):
            cast(AdaptiveMambaBlock, block).mixer.propagate(codes, block_state, rows[some], state.columns[some])
    firing = fired[index].nonzero().squeeze(-1)
    if len(firing):
        some = index[firing]
        entered = inputs[firing] if stage else system.router.to_trunk(inputs[firing])
        age = router.positions[some] + 1 - router.last_fire[some]
        stretch = None if propagates else age.to(hidden.dtype)
        left, _ = _run(blocks, entered, states, rows[some], stretch, state.columns[some])
        router.held.index_copy_(0, some, system.router.from_trunk(left - entered, stage))


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

    Two or three compiled calls: what happens in the interpreter is slow, since the weights have pushed it out of the
    caches.
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
    later, columns, depth = _later(views, state), state.columns.numpy(), state.depth.numpy()
    left, several = hidden, len(views.depths) > 1
    if several:
        left = enter_rows(places, columns, depth, views.depths, hidden, later, views.down, views.ups)
    for stage, (analyzer, tiles) in enumerate(views.placements if len(chosen) else ()):
        some = chosen[depth[chosen] == views.depths[stage]] if several else chosen
        if len(some):
            inputs = (left if stage else hidden)[some]
            logits = project_rows(norm_rows(inputs, *views.exit_norm), views.head) if traced else _NOTHING
            density = analyzer.step_rows(inputs, logits, trace, state.density, some)
            fired[some] = tiles.fire_rows(density, wanted, router, some)
    kept = (router.held, router.last_fire, router.fires, router.quota, router.positions, router.codes, router.waiting)
    logits = decode_rows(
        fired, wanted, hidden, left, places, columns, depth, views.depths, later, len(views.decoders),
        views.propagations, views.codes, views.down, views.ups, views.raw_fading, *views.final_norm, views.head,
        *(value.numpy() for value in kept),
    )  # fmt: skip
    return StepOutput(torch.from_numpy(logits), torch.from_numpy(fired))


def read_codes(system: System, state: ModelState) -> None:
    """Let the trunk's states read what waits for them; both are advanced in place."""
    views, router = system.views(), state.router
    waiting = router.waiting.numpy()
    read_waiting(
        waiting.nonzero()[0], _all_rows(len(waiting)), state.columns.numpy(), state.depth.numpy(), views.depths,
        router.codes.numpy(), waiting, _later(views, state), views.propagations,
    )  # fmt: skip


@lru_cache
def _all_rows(count: int) -> Any:
    return np.arange(count)


def _later(views: SystemViews, state: ModelState) -> tuple[tuple[Any, ...], ...]:
    """Trunk and decoders, with their states; decoders share theirs, since a sequence has one of them."""
    decoders = [block for decoder in views.decoders for block in _with_states(decoder, state.decoder)]
    return (*_with_states(views.trunk, state.trunk), *decoders)


def _with_states(blocks: tuple[AdaptiveMambaBlock, ...], states: tuple[BlockState, ...]) -> tuple[tuple[Any, ...], ...]:
    """What compiled steps read of blocks, and their states, which they advance."""
    return tuple((*block.views().step, *state.arrays()) for block, state in zip(blocks, states, strict=True))


def _make_trace(widths: tuple[int, ...], count: int) -> tuple[Any, ...]:
    """Room for the content of a :class:`~model.ops.ssd.StepTrace` of so many rows."""
    return (*(np.empty((count, width), np.float32) for width in widths), np.empty(count))
