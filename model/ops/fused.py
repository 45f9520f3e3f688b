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

from model.ops.recurrent import _ONE, _VECTORS, Singles, _exp


def fused(x: Tensor) -> bool:
    """Whether the compiled loops take this tensor: fp32, on a CPU, outside of autocast."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


@njit(nogil=True, fastmath=_VECTORS)
def _convolve(window: Singles, weight: Singles, bias: Singles, out: Singles) -> None:  # pragma: no cover - compiled
    """``silu(causal convolution)``: window [B, L + K - 1, C], weight [K, C], bias [C] into out [B, L, C]."""
    taps = weight.shape[0]
    for b in range(out.shape[0]):
        for t in range(out.shape[1]):
            row = out[b, t]
            row[:] = bias
            for k in range(taps):
                inputs, scale = window[b, t + k], weight[k]
                for c in range(row.shape[0]):
                    row[c] += inputs[c] * scale[c]
            for c in range(row.shape[0]):
                row[c] = row[c] / (_ONE + _exp(-row[c]))


@njit(nogil=True, fastmath=_VECTORS)
def _convolve_gradient(
    window: Singles, weight: Singles, bias: Singles, gradient: Singles, by_window: Singles, by_weight: Singles,
    by_bias: Singles,
) -> None:  # fmt: skip  # pragma: no cover - compiled
    """Adds the gradients of :func:`_convolve` for one of its output to those by its inputs."""
    taps, width = weight.shape
    inner = np.empty(width, np.float32)
    for b in range(gradient.shape[0]):
        for t in range(gradient.shape[1]):
            inner[:] = bias
            for k in range(taps):
                inputs, scale = window[b, t + k], weight[k]
                for c in range(width):
                    inner[c] += inputs[c] * scale[c]
            outer = gradient[b, t]
            for c in range(width):
                gate = _ONE / (_ONE + _exp(-inner[c]))
                inner[c] = outer[c] * gate * (_ONE + inner[c] * (_ONE - gate))
                by_bias[c] += inner[c]
            for k in range(taps):
                inputs, scale, into, changed = window[b, t + k], weight[k], by_window[b, t + k], by_weight[k]
                for c in range(width):
                    changed[c] += inner[c] * inputs[c]
                    into[c] += inner[c] * scale[c]


class _ConvolveSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        window, by_tap = window.contiguous(), weight.t().contiguous()
        out = window.new_empty(len(window), window.shape[1] - len(by_tap) + 1, window.shape[2])
        _convolve(*_arrays(window, by_tap, bias, out))
        ctx.save_for_backward(window, by_tap, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs = ctx.saved_tensors
        results = [torch.zeros_like(value) for value in inputs]
        _convolve_gradient(*_arrays(*inputs, gradients[0].contiguous(), *results))
        return results[0], results[1].t(), results[2]


def convolve_silu(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of a causal convolution, channel by channel.

    Args:
        window: [B, K - 1 + L, C], the inputs with those before them. weight: [C, K]. bias: [C].

    Returns:
        [B, L, C].
    """
    result: Tensor = _ConvolveSilu.apply(window, weight, bias)  # type: ignore[no-untyped-call]
    return result


@njit(nogil=True, fastmath=_VECTORS)
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


@njit(nogil=True, fastmath=_VECTORS)
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
        arguments = [*_arrays(*saved), eps, out.numpy()]
        _gate(*arguments)
        ctx.save_for_backward(*saved)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        by_rows = [torch.empty_like(value) for value in saved[:3]]
        by_channels = [torch.zeros_like(value) for value in saved[3:]]
        written = _arrays(gradients[0].contiguous(), *by_rows, *by_channels)
        arguments = [*_arrays(*saved), ctx.eps, *written]
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


def _arrays(*tensors: Tensor) -> list[Any]:
    return [value.detach().numpy() for value in tensors]
