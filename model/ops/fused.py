"""Element-wise parts of the Mamba-2 block with their gradients, each one pass over memory, for training on a CPU.

As tensor operations they take longer than all matrix products of the block together: each one writes a tensor that no
cache holds, and their gradients write several. The plain twins are the tensor operations of
:mod:`model.layers.mamba2`. Compiled anew in each process: what they call stands in another file, whose changes numba's
disk cache would not notice.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from model.ops.recurrent import _ONE, _VECTORS, Singles, _add_tap, _add_taps, _exp, _silu, norm_rows


def fused(x: Tensor) -> bool:
    """Whether the compiled loops take this tensor: fp32, on a CPU, outside of autocast."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


@njit(nogil=True, fastmath=_VECTORS, error_model="numpy")
def _through_silu(inner: Singles, gradient: Singles) -> None:  # pragma: no cover - compiled
    """Replaces what SiLU was given by the gradient by it."""
    for c in range(inner.shape[0]):
        gate = _ONE / (_ONE + _exp(-inner[c]))
        inner[c] = gradient[c] * gate * (_ONE + inner[c] * (_ONE - gate))


@njit(nogil=True)
def _mix(window: Singles, weight: Singles, bias: Singles, out: Singles) -> None:  # pragma: no cover - compiled
    """One position of the convolution: window [K, C], weight [K, C], bias [C] into out [C]."""
    out[:] = bias
    taps = weight.shape[0]
    for k in range(0, taps - 1, 2):
        _add_taps(out, window[k], weight[k], window[k + 1], weight[k + 1])
    if taps % 2:
        _add_tap(out, window[taps - 1], weight[taps - 1])


@njit(nogil=True)
def _convolve(
    window: Singles, weight: Singles, bias: Singles, x: Singles, keys: Singles
) -> None:  # pragma: no cover - compiled
    """``silu(causal convolution)``, its first channels into x [B, L, I], the others into keys [B, L, C - I].

    window: [B, L + K - 1, C]. weight: [K, C]. bias: [C].
    """
    row, first = np.empty(weight.shape[1], np.float32), x.shape[2]
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            _mix(window[b, t : t + weight.shape[0]], weight, bias, row)
            _silu(row)
            x[b, t] = row[:first]
            keys[b, t] = row[first:]


@njit(nogil=True)
def _convolve_gradient(
    window: Singles, weight: Singles, bias: Singles, by_x: Singles, by_keys: Singles, by_window: Singles,
    by_weight: Singles, by_bias: Singles,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Adds the gradients of :func:`_convolve` for those of its outputs to those by its inputs."""
    inner, first = np.empty(weight.shape[1], np.float32), by_x.shape[2]
    for b in range(by_x.shape[0]):
        for t in range(by_x.shape[1]):
            _mix(window[b, t : t + weight.shape[0]], weight, bias, inner)
            _through_silu(inner[:first], by_x[b, t])
            _through_silu(inner[first:], by_keys[b, t])
            by_bias += inner
            for k in range(weight.shape[0]):
                _add_tap(by_weight[k], inner, window[b, t + k])
                _add_tap(by_window[b, t + k], inner, weight[k])


class _ConvolveSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, window: Tensor, weight: Tensor, bias: Tensor, first: int) -> tuple[Tensor, Tensor]:
        window, by_tap = window.contiguous(), weight.t().contiguous()
        batch, length, channels = len(window), window.shape[1] - len(by_tap) + 1, window.shape[2]
        x, keys = (window.new_empty(batch, length, width) for width in (first, channels - first))
        _convolve(*arrays(window, by_tap, bias, x, keys))
        ctx.save_for_backward(window, by_tap, bias)
        return x, keys

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        results = [torch.zeros_like(value) for value in inputs]
        _convolve_gradient(*arrays(*inputs, *(gradient.contiguous() for gradient in gradients), *results))
        return results[0], results[1].t(), results[2], None


def convolve_silu(window: Tensor, weight: Tensor, bias: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """SiLU of a causal convolution, channel by channel, in two parts, so that nobody has to copy them apart.

    Args:
        window: [B, K - 1 + L, C], the inputs with those before them. weight: [C, K]. bias: [C].
        first: channels of the first part.

    Returns:
        [B, L, first] and [B, L, C - first].
    """
    parts: tuple[Tensor, Tensor] = _ConvolveSilu.apply(window, weight, bias, first)  # type: ignore[no-untyped-call]
    return parts


@njit(nogil=True, fastmath=_VECTORS, error_model="numpy")
def _gate(
    y: Singles, x: Singles, z: Singles, skip: Singles, weight: Singles, eps: float, out: Singles
) -> None:  # pragma: no cover - compiled
    """Rows of ``rms_norm((y + skip * x) * silu(z)) * weight``: all [R, I], skip and weight [I]."""
    width = out.shape[1]
    for i in range(out.shape[0]):
        ys, xs, zs, row = y[i], x[i], z[i], out[i]
        square = np.float32(0.0)
        for c in range(width):
            row[c] = (ys[c] + skip[c] * xs[c]) * zs[c] / (_ONE + _exp(-zs[c]))
            square += row[c] * row[c]
        scale = np.float32(1.0 / math.sqrt(square / width + eps))
        for c in range(width):
            row[c] *= scale * weight[c]


@njit(nogil=True, fastmath=_VECTORS, error_model="numpy")
def _gate_gradient(
    y: Singles, x: Singles, z: Singles, skip: Singles, weight: Singles, eps: float, gradient: Singles,
    by_y: Singles, by_x: Singles, by_z: Singles, by_skip: Singles, by_weight: Singles,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """The gradients of :func:`_gate` for one of its output; those by rows are written, the others added to."""
    width = gradient.shape[1]
    inner, gate, gated = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for i in range(gradient.shape[0]):
        ys, xs, zs, outer = y[i], x[i], z[i], gradient[i]
        square, along = np.float32(0.0), np.float32(0.0)
        for c in range(width):
            inner[c] = ys[c] + skip[c] * xs[c]
            gate[c] = _ONE / (_ONE + _exp(-zs[c]))
            gated[c] = inner[c] * zs[c] * gate[c]
            square += gated[c] * gated[c]
            along += gated[c] * outer[c] * weight[c]
        scale = np.float32(1.0 / math.sqrt(square / width + eps))
        shrink = np.float32(scale * scale * scale * along / width)
        into_y, into_x, into_z = by_y[i], by_x[i], by_z[i]
        for c in range(width):
            by_weight[c] += outer[c] * gated[c] * scale
            change = outer[c] * weight[c] * scale - gated[c] * shrink
            into_y[c] = change * zs[c] * gate[c]
            into_z[c] = change * inner[c] * gate[c] * (_ONE + zs[c] * (_ONE - gate[c]))
            into_x[c] = into_y[c] * skip[c]
            by_skip[c] += into_y[c] * xs[c]


class _GateNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *values, eps = inputs
        saved = [value.contiguous() for value in values]
        out = torch.empty_like(saved[0])
        arguments = [*arrays(*saved), eps, out.numpy()]
        _gate(*arguments)
        ctx.save_for_backward(*saved)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        by_rows = [torch.empty_like(value) for value in saved[:3]]
        by_channels = [torch.zeros_like(value) for value in saved[3:]]
        written = arrays(gradients[0].contiguous(), *by_rows, *by_channels)
        arguments = [*arrays(*saved), ctx.eps, *written]
        _gate_gradient(*arguments)
        return (*by_rows, *by_channels, None)


def gate_norm(y: Tensor, x: Tensor, z: Tensor, skip: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm((y + skip * x) * silu(z)) * weight`` over the last axis.

    Args:
        y, x, z: [..., I]. skip, weight: [I]. eps: added to the mean square.
    """
    rows = [value.reshape(-1, value.shape[-1]) for value in (y, x, z)]
    result: Tensor = _GateNorm.apply(*rows, skip, weight, eps)  # type: ignore[no-untyped-call]
    return result.view_as(y)


@njit(nogil=True, fastmath=_VECTORS, error_model="numpy")
def _norm_gradient(
    x: Singles, weight: Singles, eps: float, gradient: Singles, by_x: Singles, by_weight: Singles
) -> None:  # pragma: no cover - compiled
    """The gradients of :func:`norm_rows` for one of its output; that by x is written, the other added to."""
    width = gradient.shape[1]
    for i in range(gradient.shape[0]):
        values, outer, into = x[i], gradient[i], by_x[i]
        square, along = np.float32(0.0), np.float32(0.0)
        for c in range(width):
            square += values[c] * values[c]
            along += values[c] * outer[c] * weight[c]
        scale = np.float32(1.0 / math.sqrt(square / width + eps))
        shrink = np.float32(scale * scale * scale * along / width)
        for c in range(width):
            by_weight[c] += outer[c] * values[c] * scale
            into[c] = outer[c] * weight[c] * scale - values[c] * shrink


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        arguments = [*arrays(x, weight), eps]
        rows: Tensor = torch.from_numpy(norm_rows(*arguments))
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight = torch.empty_like(x), torch.zeros_like(weight)
        arguments = [*arrays(x, weight), ctx.eps, *arrays(gradients[0].contiguous(), by_x, by_weight)]
        _norm_gradient(*arguments)
        return by_x, by_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm(x) * weight`` over the last axis.

    Args:
        x: [..., D]. weight: [D]. eps: added to the mean square.
    """
    result: Tensor = _Norm.apply(x.reshape(-1, x.shape[-1]), weight, eps)  # type: ignore[no-untyped-call]
    return result.view_as(x)


def arrays(*tensors: Tensor) -> list[Any]:
    """The same memory, as the compiled loops take it."""
    return [value.detach().numpy() for value in tensors]
