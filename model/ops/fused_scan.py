"""The chunked recurrence with its gradient by hand, for training on a CPU.

Between the matrix products of :func:`model.ops.ssd.ssd_scan`, the plain twin, tensor operations write one tensor after
the other that no cache holds; here one loop stands before each product and one after it. The gradient by the
logarithms of the decays needs no product of its own: an output is a sum of terms that hold ``exp(T_i - T_j)``, T being
the sum of the logarithms so far, so the loss changes with ``T_i`` by ``<y_i, dy_i> - <x_i, dx_i>``. Where a state
forgets within a byte these two are nearly equal, and what is left has the rounding error of both.

Symbols as in :mod:`model.ops.ssd`; b sequences of c chunks each are one axis of n = b * c. Compiled anew in each
process, as :mod:`model.ops.fused` is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from model.ops.fused import arrays
from model.ops.products import products
from model.ops.recurrent import _VECTORS, Singles, _dot, _exp
from model.ops.ssd import _FAINT, ScanResult, into_chunks

_LEAST = np.float32(-_FAINT)


@njit(nogil=True, fastmath=_VECTORS, error_model="numpy")
def _scale(out: Singles, values: Singles, factor: np.float32) -> None:  # pragma: no cover - compiled
    for i in range(out.shape[0]):
        out[i] = values[i] * factor


@njit(nogil=True, fastmath=_VECTORS, error_model="numpy")
def _scale_add(out: Singles, one: Singles, other: Singles, factor: np.float32) -> None:  # pragma: no cover - compiled
    for i in range(out.shape[0]):
        out[i] = one[i] + other[i] * factor


@njit(nogil=True, fastmath=_VECTORS, error_model="numpy")
def _decay_row(
    total: Singles, i: int, shared: Singles, decay: Singles, scores: Singles
) -> None:  # pragma: no cover - compiled
    for j in range(i + 1):
        decay[j] = _exp(max(total[i] - total[j], _LEAST))
        scores[j] = shared[j] * decay[j]


@njit(nogil=True)
def _decay(total: Singles, shared: Singles, decay: Singles, scores: Singles) -> None:  # pragma: no cover - compiled
    """What position i has of position j of its chunk, zero for j > i: decay [n, H, Q, Q], and with it scores.

    total: [n, H, Q]. shared: [n, Q, Q], the products of C and B, which are the same for all heads.
    """
    chunks, heads, length = total.shape
    for n in range(chunks):
        for h in range(heads):
            for i in range(length):
                _decay_row(total[n, h], i, shared[n, i], decay[n, h, i], scores[n, h, i])
                decay[n, h, i, i + 1 :] = 0.0
                scores[n, h, i, i + 1 :] = 0.0


@njit(nogil=True)
def _weigh(
    x: Singles, dt: Singles, total: Singles, by_head: Singles, to_end: Singles
) -> None:  # pragma: no cover - compiled
    """``dt x``: by_head [n, H, Q, P], and what of it reaches the end of its chunk: to_end [n, Q, H, P].

    x: [n, Q, H, P]. dt: [n, Q, H]. total: [n, H, Q].
    """
    chunks, length, heads, _ = x.shape
    for n in range(chunks):
        for q in range(length):
            for h in range(heads):
                _scale(by_head[n, h, q], x[n, q, h], dt[n, q, h])
                _scale(to_end[n, q, h], by_head[n, h, q], _exp(total[n, h, length - 1] - total[n, h, q]))


@njit(nogil=True)
def _carry(
    added: Singles, total: Singles, initial: Singles, before: Singles, final: Singles
) -> None:  # pragma: no cover - compiled
    """States before each chunk, and the last one, of what each chunk adds [n, H, P * N].

    initial, final: [b, H, P * N].
    """
    heads, length = total.shape[1:]
    chunks = len(added) // len(initial)
    for b in range(len(initial)):
        for c in range(chunks):
            n = b * chunks + c
            before[n] = initial[b] if c == 0 else final[b]
            for h in range(heads):
                _scale_add(final[b, h], added[n, h], before[n, h], _exp(total[n, h, length - 1]))


@njit(nogil=True)
def _carry_gradient(
    by_before: Singles, total: Singles, by_final: Singles, by_added: Singles, by_initial: Singles
) -> None:  # pragma: no cover - compiled
    """The gradients of :func:`_carry`, by_before being those that do not come through later chunks."""
    heads, length = total.shape[1:]
    chunks = len(by_added) // len(by_initial)
    for b in range(len(by_initial)):
        by_initial[b] = by_final[b]
        for c in range(chunks - 1, -1, -1):
            n = b * chunks + c
            by_added[n] = by_initial[b]
            for h in range(heads):
                _scale_add(by_initial[b, h], by_before[n, h], by_added[n, h], _exp(total[n, h, length - 1]))


@njit(nogil=True)
def _join(inside: Singles, past: Singles, total: Singles, y: Singles) -> None:  # pragma: no cover - compiled
    """Outputs [n, Q, H, P] of those from inside [n, H, Q, P] the chunk and from before it [n, Q, H, P]."""
    chunks, length, heads, _ = y.shape
    for n in range(chunks):
        for q in range(length):
            for h in range(heads):
                _scale_add(y[n, q, h], inside[n, h, q], past[n, q, h], _exp(total[n, h, q]))


@njit(nogil=True)
def _join_gradient(
    by_y: Singles, total: Singles, by_inside: Singles, by_past: Singles
) -> None:  # pragma: no cover - compiled
    """The gradients of :func:`_join`, but for those by ``total``."""
    chunks, length, heads, _ = by_y.shape
    for n in range(chunks):
        for q in range(length):
            for h in range(heads):
                by_inside[n, h, q] = by_y[n, q, h]
                _scale(by_past[n, q, h], by_y[n, q, h], _exp(total[n, h, q]))


@njit(nogil=True)
def _weigh_gradient(
    x: Singles, dt: Singles, total: Singles, y: Singles, by_y: Singles, by_head: Singles, to_end: Singles,
    by_x: Singles, by_dt: Singles, by_total: Singles,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """The gradients of :func:`_weigh`, and by_total [n, Q, H], those of the whole scan by the sum of logarithms."""
    chunks, length, heads, headdim = x.shape
    weighted = np.empty(headdim, np.float32)
    for n in range(chunks):
        for q in range(length):
            for h in range(heads):
                reach = _exp(total[n, h, length - 1] - total[n, h, q])
                _scale_add(weighted, by_head[n, h, q], to_end[n, q, h], reach)
                _scale(by_x[n, q, h], weighted, dt[n, q, h])
                by_dt[n, q, h] = _dot(weighted, x[n, q, h])
                by_total[n, q, h] = _dot(by_y[n, q, h], y[n, q, h]) - dt[n, q, h] * by_dt[n, q, h]


class _Scan(torch.autograd.Function):
    @staticmethod
    @products("highest")
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks, length, heads, headdim = x.shape
        d_state = B.shape[-1]
        x, dt, B, C = (value.contiguous() for value in (x, dt, B, C))
        initial = initial_state.reshape(len(initial_state), heads, -1).contiguous()
        total = (dt * A).transpose(1, 2).cumsum(-1).contiguous()  # [n, H, Q]

        weighted, to_end = x.new_empty(chunks, heads, length, headdim), torch.empty_like(x)
        _weigh(*arrays(x, dt, total, weighted, to_end))
        decay, scores = (x.new_empty(chunks, heads, length, length) for _ in range(2))
        _decay(*arrays(total, C @ B.transpose(1, 2), decay, scores))
        added = (to_end.flatten(2).transpose(1, 2) @ B).view(chunks, heads, -1)
        before, final = torch.empty_like(added), torch.empty_like(initial)
        _carry(*arrays(added, total, initial, before, final))
        past = C @ before.view(chunks, -1, d_state).transpose(1, 2)
        y = torch.empty_like(x)
        _join(*arrays(scores @ weighted, past.view_as(x), total, y))

        states = before.view(len(initial), -1, heads, headdim, d_state)
        ctx.save_for_backward(x, dt, A, B, C, total, decay, weighted, to_end, scores, before, y, final)
        ctx.mark_non_differentiable(states)
        return y, final.view_as(initial_state), states

    @staticmethod
    @products("highest")
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, ...]:
        x, dt, A, B, C, total, decay, weighted, to_end, scores, before, y, final = ctx.saved_tensors
        chunks, _, heads, headdim = x.shape
        sequences, d_state = len(final), B.shape[-1]
        by_y, by_final = gradients[0].contiguous(), gradients[1].reshape(sequences, heads, -1).contiguous()

        by_inside, by_past = torch.empty_like(weighted), torch.empty_like(x)
        _join_gradient(*arrays(by_y, total, by_inside, by_past))
        by_past = by_past.flatten(2)  # [n, Q, HP]
        by_shared = (by_inside @ weighted.transpose(2, 3)).mul_(decay).sum(1)
        by_before = (by_past.transpose(1, 2) @ C).view_as(before)
        by_added, by_initial = torch.empty_like(before), torch.empty_like(final)
        _carry_gradient(*arrays(by_before, total, by_final, by_added, by_initial))
        states, by_states = (value.view(chunks, -1, d_state) for value in (before, by_added))  # [n, HP, N]
        by_B = by_shared.transpose(1, 2) @ C + to_end.flatten(2) @ by_states
        by_C = by_shared @ B + by_past @ states

        by_weighted, by_to_end = scores.transpose(2, 3) @ by_inside, (B @ by_states.transpose(1, 2)).view_as(x)
        by_x, by_dt, by_total = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(dt)
        _weigh_gradient(*arrays(x, dt, total, y, by_y, by_weighted, by_to_end, by_x, by_dt, by_total))
        # Sums over a whole sequence, of terms that nearly cancel: in float64.
        sums = by_total.double().view(sequences, -1, heads)
        sums[:, -1] += (by_final * final).double().view(sequences, heads, -1).sum(2)
        by_log_decay = sums.flip(1).cumsum(1).flip(1).view_as(dt)
        by_A = (by_log_decay * dt).sum((0, 1)).to(A.dtype)
        by_dt += (by_log_decay * A).to(dt.dtype)
        return by_x, by_dt, by_A, by_B, by_C, by_initial.view(sequences, heads, headdim, d_state)


def fused_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor, chunk_size: int
) -> ScanResult:
    """What :func:`model.ops.ssd.ssd_scan` computes, fp32 on a CPU; the states before the chunks carry no gradient."""
    sequences, length = x.shape[:2]
    chunked = [into_chunks(value, chunk_size).flatten(0, 1) for value in (x, dt, B, C)]
    outputs = _Scan.apply(chunked[0], chunked[1], A, *chunked[2:], initial_state)  # type: ignore[no-untyped-call]
    y, final_state, states = outputs
    return ScanResult(y.unflatten(0, (sequences, -1)).flatten(1, 2)[:, :length], final_state, states)
