"""Stacks of residual blocks on a CPU, by compiled loops and matrix products that are cut the same way for any threads.

The plain twins are the tensor operations of :mod:`model.layers.mamba2`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.layers.propagation import Propagated
from model.ops.parallel import loop_threads, own_threads, share
from model.ops.recurrent import keep_window, mixer_rows, norm_rows
from model.ops.ssd import ScanTrace
from model.state import BlockState

PIECE = 256
"""Positions of one matrix product. A longer one may be cut by its library depending on the threads, and change bits."""
SHARED_FROM = 64
"""Positions from which a pass is shared among threads: fewer are read faster by one."""
SCRATCH_SIZE = 1 << 22
"""Numbers of an intermediate result up to which its memory is kept for the next pass."""

_kept = threading.local()


@dataclass(frozen=True, slots=True)
class BlockViews:
    """What compiled code reads of an :class:`~model.layers.mamba2.AdaptiveMambaBlock`."""

    in_proj: Tensor
    """[D, z | x B C | dt]."""
    out_proj: Tensor
    """[HP, D]."""
    norm: tuple[Any, float]
    """Of the block's input: weight [D], epsilon."""
    gate_norm: tuple[Any, float]
    """Of the gated outputs: weight [HP], epsilon."""
    A_log: Any
    """[H]."""
    propagation: Tensor | None
    """[r, x B C | dt]; None where the state does not read what the block skips."""
    chunk_size: int
    mixer: tuple[Any, ...]
    """The last arguments of :func:`~model.ops.recurrent.mixer_rows`, from the levels on."""
    step: tuple[Any, ...]
    """Those of :func:`~model.ops.recurrent.block_rows`, from the levels up to the state."""


def read_stack(
    blocks: Sequence[BlockViews],
    hidden: Tensor,
    states: Sequence[BlockState],
    stretch: Tensor | None = None,
    lengths: Tensor | None = None,
    columns: Tensor | None = None,
    propagated: Propagated | None = None,
    *,
    traced: bool = False,
) -> tuple[Tensor, tuple[BlockState, ...], ScanTrace | None]:
    """Read L positions by a stack of blocks of one shape, shared among threads if it is enough for them; no gradient.

    What one block adds and what the next one projects are of the same positions, so that threads meet twice a block.

    Args:
        hidden: [B, L, D], or [B, K, D] of L positions that are propagated. states: before them, not changed.
        stretch: [B, L] bytes per step, at least 1; None for 1.
        lengths: [B] positions that count; what stands beyond is padding. None: all.
        columns: [B] of the state that run; None for all of them. traced: whether the last block's trace is wanted.
        propagated: the positions of which ``hidden`` is at some; their fires replace ``lengths``.

    Returns:
        output [B, L, D] (or K), the states after, and the trace.
    """
    if not blocks:
        return hidden, (), None
    batch, count, width = hidden.shape
    length = count if propagated is None else propagated.fires.shape[1]
    threads = loop_threads() if batch * length >= SHARED_FROM else 1
    flat = hidden.reshape(-1, width).clone()
    between = None if propagated is None else _Between.of(propagated, count)
    rows = batch * count + (0 if between is None else len(between.codes))
    projected = _scratch("projected", rows, blocks[0].in_proj.shape[1])
    gated = _scratch("gated", batch * count, blocks[0].out_proj.shape[0])
    if lengths is not None or (between is not None and between.padded):
        gated.zero_()  # padding has no outputs
    counted = length if lengths is None or between is not None else lengths
    positions = (
        torch.arange(batch * length).view(batch, length) if between is None else between.order,
        torch.zeros(batch, length) if stretch is None else stretch.log(),
        torch.arange(length).expand(batch, -1).contiguous() if between is None else between.places,
        torch.as_tensor(counted).expand(batch).contiguous(),
    )
    cuts = _cuts(batch, count)
    after: list[BlockState] = []
    trace = done = None
    with own_threads():
        for views, state in zip(blocks, states, strict=True):
            project = partial(_add_and_project, flat, gated, projected, done, views)
            _share(project, cuts, threads)
            if between is not None:
                between.project(views, projected[batch * count :], threads)
            wanted = traced and views is blocks[-1]
            new, trace = _mix(views, projected, gated, positions, columns, state, threads, traced=wanted)
            after.append(new)
            done = views
        finish = partial(_add_and_project, flat, gated, projected, done, None)
        _share(finish, cuts, threads)
    return flat.view(batch, count, width), tuple(after), trace


@dataclass(frozen=True, slots=True)
class _Between:
    """Where in BL positions blocks are run, and what their states read elsewhere."""

    order: Tensor
    """[B, L] the row of each position among BK that are run, padding included, and then those that are not."""
    places: Tensor
    """[B, L] the one of K that a position is, -1 where nothing is run."""
    codes: Tensor
    """[n, r] of the positions that are not run."""
    padded: bool
    """Whether some of the BK are padding."""

    @staticmethod
    def of(propagated: Propagated, count: int) -> _Between:
        """What ``propagated`` says, of which ``count`` positions are run in each row, padding included."""
        fires = propagated.fires
        batch, length = fires.shape
        ran = fires.cumsum(1)
        places = torch.where(fires, ran - 1, -1)
        rest = (~fires).flatten()
        start = torch.arange(0, batch * count, count) if count else torch.zeros(batch, dtype=torch.int64)
        order = torch.where(
            fires, places + start.unsqueeze(1), (rest.cumsum(0) + (batch * count - 1)).view(batch, length)
        )
        codes = propagated.codes.flatten(0, 1)[rest]
        return _Between(order, places, codes, padded=bool((ran[:, -1] < count).any()))

    def project(self, views: BlockViews, projected: Tensor, threads: int) -> None:
        """Write into ``projected`` [n, z | x B C | dt] what is read without being run; there is no z."""
        assert views.propagation is not None
        weight, read = views.propagation, projected[:, views.out_proj.shape[0] :]

        def write(start: int, end: int) -> None:
            torch.mm(self.codes[start:end], weight, out=read[start:end])

        _share(write, _cuts(1, len(self.codes)), threads)


def _cuts(batch: int, length: int) -> list[tuple[int, int]]:
    """Pieces of one matrix product each."""
    return [
        (row + start, row + min(start + PIECE, length))
        for row in range(0, batch * length, max(length, 1))
        for start in range(0, length, PIECE)
    ]


def _scratch(name: str, rows: int, width: int) -> Tensor:
    """Room [rows, width] for what lasts as long as one pass; the calling thread gets the same again.

    New memory is cleared page by page when it is first touched, which takes a tenth of the time of a pass.
    """
    size = rows * width
    if size > SCRATCH_SIZE:
        return torch.empty(rows, width)
    room: Tensor | None = _kept.__dict__.get(name)
    if room is None or len(room) < size:
        with torch.inference_mode(False):  # a tensor that is made inside may not be written outside
            room = _kept.__dict__[name] = torch.empty(size)
    return room[:size].view(rows, width)


def _share(work: Callable[[int, int], None], cuts: list[tuple[int, int]], threads: int) -> None:
    """``work`` on all of the cuts, by threads that have the settings of this one."""
    inference = torch.is_inference_mode_enabled()

    def run(start: int, end: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for cut in cuts[start:end]:
                work(*cut)

    if cuts:
        share(run, len(cuts), threads)


def _add_and_project(
    flat: Tensor,
    gated: Tensor,
    projected: Tensor,
    done: BlockViews | None,
    coming: BlockViews | None,
    start: int,
    end: int,
) -> None:
    """At some rows: add what one block has computed to ``flat`` [BK, D], then normalise and project for the next."""
    rows = flat[start:end]
    if done is not None:
        rows.addmm_(_normalised(gated[start:end], done.gate_norm), done.out_proj)
    if coming is not None:
        torch.mm(_normalised(rows, coming.norm), coming.in_proj, out=projected[start:end])


def _mix(
    views: BlockViews,
    projected: Tensor,
    gated: Tensor,
    positions: tuple[Tensor, Tensor, Tensor, Tensor],
    columns: Tensor | None,
    state: BlockState,
    threads: int,
    *,
    traced: bool,
) -> tuple[BlockState, ScanTrace | None]:
    """From projections [R, z | x B C | dt] to gated outputs [BK, HP], the state after, and the trace.

    ``positions``: the row of each of BL positions, and ``log_stretch``, ``places`` and ``lengths`` of the mixer.
    """
    order, log_stretch, places, lengths = positions
    batch, length = log_stretch.shape
    heads, headdim, width = state.ssm_state.shape[1:]
    columns = torch.full((batch,), width) if columns is None else columns
    after = BlockState(*(value.clone(memory_format=torch.contiguous_format) for value in state.tensors()))
    chunks = -(-length // views.chunk_size) if traced else 0
    before = torch.zeros(batch, chunks, *after.ssm_state.shape[1:])
    mixed = torch.empty(batch, length if traced else 0, state.conv_state.shape[-1])
    steps, changes = torch.zeros(2, batch, heads, length if traced else 0)
    tensors = (
        projected, order, log_stretch, places, lengths, columns, state.conv_state.contiguous(),
        after.ssm_state, before, mixed, steps, changes, gated.view(batch, len(gated) // batch, gated.shape[1]),
    )  # fmt: skip
    arguments = [*(value.numpy() for value in tensors), views.chunk_size, *views.mixer]
    share(lambda first, last: mixer_rows(first, last, *arguments), heads, threads)
    inner = heads * headdim
    keep_window(arguments[0], arguments[1], arguments[4], after.conv_state.numpy(), inner)
    if not traced:
        return after, None
    x, keys = mixed.split([inner, mixed.shape[-1] - inner], dim=-1)
    B, C = (part[..., :width] for part in keys.chunk(2, dim=-1))
    A = -torch.from_numpy(views.A_log).exp()
    change = changes.double().sum(1)
    return after, ScanTrace(x.unflatten(-1, (heads, headdim)), steps.transpose(1, 2), A, B, C, before, change)


def _normalised(rows: Tensor, norm: tuple[Any, float]) -> Tensor:
    weight, eps = norm
    return torch.from_numpy(norm_rows(rows.numpy(), weight, eps))
