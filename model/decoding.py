"""One decoding step of the assembled model: by tensor operations on any device, and by compiled loops on a CPU.

The two do the same, line by line. On a CPU a step of a small model is dominated by the overhead of its many tiny tensor
operations, so the fast one works on numpy views of the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

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
from model.ops.recurrent import Singles, hold_rows, norm_rows, project_rows
from model.ops.ssd import StepTrace
from model.ops.tiling import Booleans, Integers
from model.state import BlockState, ModelState


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

    @property
    def head_weight(self) -> Tensor:
        """[V, d_model] of both heads."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Result of reading one token per sequence."""

    logits: Tensor
    """[B, V]."""
    fired: Tensor
    """[B] bool: the trunk ran."""


def step_plain(system: System, tokens: Tensor, state: ModelState, rates: Tensor, rows: Tensor) -> StepOutput:
    """Read one token per sequence by tensor operations.

    Args:
        tokens: [n]. state: advanced in place; the blocks' of B sequences, the rest of those that take part.
        rates: [n] float64 fires per byte, 0 to 1. rows: [n] int64, where in the blocks' states they are.
    """
    router = state.router
    full = torch.full_like(rows, system.config.d_state)
    hidden, trace = _run(system.encoder, system.embedding(tokens), state.encoder, rows, None, full)
    fired = rates >= 1.0
    chosen = ((rates > 0.0) & ~fired).nonzero().squeeze(-1)
    if len(chosen):
        logits = nn.functional.linear(system.exit_norm(hidden[chosen]), system.head_weight)
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
    age = router.positions + 1 - router.last_fire
    index = fired.nonzero().squeeze(-1)
    if len(index):
        entered = system.router.to_trunk(hidden[index])
        stretch = age[index].to(hidden.dtype)
        left, _ = _run(system.trunk, entered, state.trunk, rows[index], stretch, state.columns[index])
        router.held.index_copy_(0, index, system.router.from_trunk(left - entered))
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


def step_compiled(system: System, tokens: Tensor, state: ModelState, rates: Tensor, rows: Tensor) -> StepOutput:
    """The same on a CPU; a row has the same bits whatever rows stand beside it."""
    router, wanted, places = state.router, rates.numpy(), rows.numpy()
    full, fresh = np.full(len(wanted), system.config.d_state), np.zeros(len(wanted), np.float32)
    head = _array(system.head_weight)
    hidden = _array(system.embedding.weight)[tokens.numpy()]
    fired = wanted >= 1.0
    chosen = np.flatnonzero((wanted > 0.0) & ~fired)
    analysed = bool(len(chosen))
    trace = _run_compiled(system.encoder, hidden, state.encoder, places, fresh, full, traced=analysed)
    if analysed:
        outputs = hidden[chosen]
        logits = project_rows(_normalised(system.exit_norm, outputs), head)
        density = system.density.step_rows(outputs, logits, trace, state.density, chosen)
        fired[chosen] = system.tiles.fire_rows(density, wanted, router, chosen)
    index = np.flatnonzero(fired)
    if len(index):
        _step_trunk(system, hidden[index], state, index, places[index])
    output = hold_rows(
        fired, wanted, hidden, _array(system.router.raw_fading), router.held.numpy(), router.last_fire.numpy(),
        router.fires.numpy(), router.quota.numpy(), router.positions.numpy(),
    )  # fmt: skip
    if len(system.decoder):
        _run_compiled(system.decoder, output, state.decoder, places, fresh, full)
    return StepOutput(torch.from_numpy(project_rows(_normalised(system.final_norm, output), head)), _tensor(fired))


def _step_trunk(system: System, entered: Singles, state: ModelState, index: Integers, places: Integers) -> None:
    """Run the trunk for those that fire, with encoder outputs ``entered`` [n, d_model], and hold its update.

    ``index`` [n] says which of those that take part they are, ``places`` [n] where in the blocks' states.
    """
    down, up = system.router.down, system.router.up
    if down is not None:
        entered = project_rows(entered, _array(down.weight))
    left = entered.copy()
    age = state.router.positions.numpy()[index] + 1 - state.router.last_fire.numpy()[index]
    stretch = np.log(age).astype(np.float32)
    _run_compiled(system.trunk, left, state.trunk, places, stretch, state.columns.numpy()[index])
    update = left - entered
    state.router.held.numpy()[index] = update if up is None else project_rows(update, _array(up.weight))


def _run_compiled(
    blocks: nn.ModuleList,
    hidden: Singles,
    states: tuple[BlockState, ...],
    rows: Integers,
    log_stretch: Singles,
    columns: Integers,
    *,
    traced: bool = False,
) -> tuple[Any, ...]:
    """A stack of at least one block, ``hidden`` [n, D] changed in place; the last one's trace as arrays."""
    for block, state in zip(blocks, states, strict=True):
        assert isinstance(block, AdaptiveMambaBlock)
        trace = block.step_compiled(hidden, state, rows, log_stretch, columns, traced=traced)
    return trace


def _normalised(norm: RMSNorm, rows: Singles) -> Singles:
    normal: Singles = norm_rows(rows, _array(norm.weight), norm.eps)
    return normal


def _array(weight: Tensor) -> Any:
    return weight.detach().numpy()


def _tensor(fired: Booleans) -> Tensor:
    return torch.from_numpy(fired)
