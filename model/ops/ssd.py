"""The selective state-space recurrence of Mamba-2 (state space duality), chunk-parallel and one step at a time.

Symbols, here and everywhere in ``model``: B sequences, L positions, H heads, P head dim, N state size, Q chunk
length, c number of chunks. For every head, with ``a_t = exp(dt_t * A)``::

    h_t = a_t * h_{t-1} + dt_t * x_t B_tᵀ        h: [P, N]
    y_t = h_t C_t

Source: Dao and Gu 2024, "Transformers are SSMs", section 6 (block decomposition of the semiseparable matrix). One
group of B and C serves all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FAINT = 80.0
"""Decays under exp(-80) count as that, which is the least that fp32 holds with room for products."""


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What one chunked scan leaves behind."""

    y: Tensor
    """[B, L, H, P] outputs, without the skip term ``D * x``."""
    final_state: Tensor
    """[B, H, P, N] state after the last position."""
    chunk_states: Tensor
    """[B, c, H, P, N] state before each chunk."""


@dataclass(frozen=True, slots=True)
class ScanTrace:
    """The inner quantities of one pass of a block over L positions, which the density analyzer reads. No gradient."""

    x: Tensor
    """[B, L, H, P]."""
    dt: Tensor
    """[B, L, H]."""
    A: Tensor
    """[H]."""
    B: Tensor
    """[B, L, N]."""
    C: Tensor
    """[B, L, N]."""
    before: Tensor
    """[B, c, H, P, N] state before each chunk."""
    change: Tensor | None = None
    """[B, L] squared norm of the change of the state over all heads, where it was measured on the way."""


@dataclass(frozen=True, slots=True)
class StepTrace:
    """The same of one position, for n rows of a batch."""

    B: Tensor
    """[n, N]."""
    C: Tensor
    """[n, N]."""
    dt: Tensor
    """[n, H]."""
    log_decay: Tensor
    """[n, H] ``dt * A``."""
    change: Tensor
    """[n] float64, squared norm of the change of the state over all heads."""

    def select(self, index: Tensor) -> StepTrace:
        """Some of the rows (LongTensor)."""
        return StepTrace(*(value[index] for value in (self.B, self.C, self.dt, self.log_decay, self.change)))


def segment_decay(log_decay: Tensor, *, strict: bool = False) -> Tensor:
    """Decay from position j to position i inside a chunk.

    Args:
        log_decay: [..., Q] logarithm of the decay of each position, at most 0.
        strict: read the state *before* position i is added: ``exp(sum of j+1 .. i-1)``, zero for j >= i.

    Returns:
        [..., Q, Q]: ``exp(sum of log_decay over j+1 .. i)`` for j <= i, else 0. Bounded before ``exp``: above the
        diagonal nothing can overflow (and poison the gradient with ``0 * inf``), and below it nothing gets so small
        that a CPU takes ten times as long for it.
    """
    total = torch.cumsum(log_decay, dim=-1)
    rows = total - log_decay if strict else total
    return (rows.unsqueeze(-1) - total.unsqueeze(-2)).clamp(-_FAINT, 0.0).exp().tril(-1 if strict else 0)


def into_chunks(value: Tensor, chunk_size: int) -> Tensor:
    """[B, L, ...] -> [B, c, Q, ...], padded with zeros (``dt = 0`` leaves the state as it is)."""
    missing = -value.shape[1] % chunk_size
    if missing:
        value = F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing))
    return value.reshape(value.shape[0], -1, chunk_size, *value.shape[2:])


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor, chunk_size: int
) -> ScanResult:
    """Run the recurrence over L positions, chunk by chunk, in parallel inside a chunk.

    Chunks are counted from the first position given: for results that do not depend on how a sequence is cut into
    calls, cut it at multiples of ``chunk_size``.

    Args:
        x: [B, L, H, P]. dt: [B, L, H], positive. A: [H], negative. B, C: [B, L, N].
        initial_state: [B, H, P, N], not changed.
    """
    batch, length, heads, headdim = x.shape
    log_decay = into_chunks(dt * A, chunk_size)  # [B, c, Q, H]
    xdt = into_chunks((x * dt.unsqueeze(-1)).flatten(2), chunk_size)  # [B, c, Q, HP]
    Bc, Cc = into_chunks(B, chunk_size), into_chunks(C, chunk_size)  # [B, c, Q, N]
    total = torch.cumsum(log_decay, dim=2)  # [B, c, Q, H]

    decay = segment_decay(log_decay.transpose(2, 3))  # [B, c, H, Q, Q]
    scores = (Cc @ Bc.transpose(-1, -2)).unsqueeze(2) * decay
    inside = scores @ xdt.unflatten(-1, (heads, headdim)).transpose(2, 3)  # [B, c, H, Q, P]

    to_end = (total[:, :, -1:] - total).exp()  # [B, c, Q, H]
    weighted = (xdt.unflatten(-1, (heads, headdim)) * to_end.unsqueeze(-1)).flatten(3)
    added = (weighted.transpose(-1, -2) @ Bc).unflatten(2, (heads, headdim))  # [B, c, H, P, N]
    pass_states = _pass_one_by_one if x.device.type == "cpu" else _pass_at_once
    states = pass_states(initial_state, added, total[:, :, -1])  # [B, c + 1, H, P, N]
    before = states[:, :-1]

    past = (Cc @ before.flatten(2, 3).transpose(-1, -2)).unflatten(-1, (heads, headdim))  # [B, c, Q, H, P]
    y = torch.addcmul(inside.transpose(2, 3), past, total.exp().unsqueeze(-1))
    y = y.reshape(batch, -1, heads, headdim)[:, :length]
    return ScanResult(y, states[:, -1].clone(), before)  # a copy: it outlives the others


def _pass_one_by_one(initial: Tensor, added: Tensor, log_decay: Tensor) -> Tensor:
    """States [B, c + 1, H, P, N] at the chunks' bounds, the initial one first: c small operations, no others.

    Args:
        initial: [B, H, P, N]. added: [B, c, H, P, N] by each chunk. log_decay: [B, c, H] over each chunk.
    """
    states = [initial]
    # unbind, not indexing: the gradient of an indexed chunk is a whole zero tensor, quadratic in the chunks.
    for kept, new in zip(log_decay.exp()[..., None, None].unbind(1), added.unbind(1), strict=True):
        states.append(torch.addcmul(new, kept, states[-1]))
    return torch.stack(states, dim=1)


def _pass_at_once(initial: Tensor, added: Tensor, log_decay: Tensor) -> Tensor:
    """The same as one matrix product, for a GPU: it does c times the operations, and waits for no launches."""
    given = torch.cat([initial.unsqueeze(1), added], dim=1)
    decay = segment_decay(F.pad(log_decay, (0, 0, 1, 0)).transpose(1, 2))  # [B, H, c + 1, c + 1]
    passed: Tensor = (decay @ given.transpose(1, 2).flatten(3)).unflatten(-1, given.shape[-2:])
    return passed.transpose(1, 2)


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position of the recurrence.

    Args:
        x: [B, H, P]. dt: [B, H]. A: [H]. B, C: [B, N]. state: [B, H, P, N], not changed.

    Returns:
        y [B, H, P] and the new state [B, H, P, N].
    """
    decay = (dt * A).exp()[..., None, None]
    xdt = x * dt.unsqueeze(-1)
    state = state * decay + xdt.unsqueeze(-1) * B[:, None, None, :]
    return (state * C[:, None, None, :]).sum(-1), state


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain twin of :func:`ssd_scan`: one position after the other. Shapes as there.

    Returns:
        y [B, L, H, P] and the final state [B, H, P, N].
    """
    outputs = []
    state = initial_state
    for t in range(x.shape[1]):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
