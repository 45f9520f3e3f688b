"""Compiled loops of the Mamba-2 block on a CPU: all but the projections of a pass, and the whole of a decoding step.

A decoding step is a few milliseconds of tensor operations that each do next to nothing; compiled, it is bound by
reading the weights once. Every row of a batch is computed by the same instructions whatever stands beside it, so its
result has the same bits. The plain twins are the tensor operations of :mod:`model.layers.mamba2` and
:mod:`model.decoding`. All in one file: numba's disk cache does not notice when functions of another file change.

Symbols as in :mod:`model.ops.ssd`; n rows of a batch of B take part in a step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from model.ops.tiling import Booleans, Floats, Integers
from model.ops.words import Matrix

Singles = NDArray[np.float32]

# Sums may be reordered into vector registers; infinities and NaN keep their meaning.
_VECTORS = {"reassoc", "contract", "nsz"}
_ONE = np.float32(1.0)
_LANES = 8
"""Numbers in a vector of a product: a register of AVX2, two of NEON."""
_REACH = 16
"""Positions that one head reads before the next does: what the heads share stays in the nearest caches meanwhile."""


def compiled(x: Tensor) -> bool:
    """Whether the compiled loops take this tensor: fp32, on a CPU, and nobody will ask for its gradient."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


@njit(inline="always")
def _exp(x: np.float32) -> np.float32:  # pragma: no cover - compiled
    """The exponential to a relative error of 1e-7, in operations that fill vector registers; never 0 nor infinite.

    Range reduction by log 2 and the polynomial of Cephes' ``expf`` (Moshier 1989).
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - whole * np.float32(0.693359375)) + whole * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + _ONE
    bits = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return np.float32(p * bits.view(np.float32))


@njit(cache=True, nogil=True, fastmath=_VECTORS)
def _dot(one: Singles, other: Singles) -> np.float32:  # pragma: no cover - compiled
    total = np.float32(0.0)
    for d in range(one.shape[0]):
        total = np.float32(total + one[d] * other[d])
    return total


def _make_products(rows: int, columns: int, *, packed: bool) -> Any:
    """Compiled code that fills ``y[i : i + rows, v : v + columns]`` with products of rows of ``x`` and of a matrix.

    ``packed``: the matrix is given by its bf16 numbers. Written in LLVM's vectors, since what a compiler makes of a
    loop over sums depends on what stands around it: here a product is added up in the same order wherever it is
    computed, so that tiles of any size, and numbers in fp32 or in bf16, give the same bits. What is beyond a multiple
    of ``_LANES`` is left to the caller.

    Raises:
        TypingError: when it is compiled, for an array whose rows do not lie one after the other.
    """
    vector = ir.VectorType(ir.FloatType(), _LANES)
    halves, bits = (ir.VectorType(ir.IntType(size), _LANES) for size in (16, 32))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def number(value: int) -> Any:
            return context.get_constant(types.intp, value)

        def row(data: Any, start: Any, offset: int, width: Any) -> Any:
            return builder.gep(data, [builder.mul(builder.add(start, number(offset)), width)])

        def load(data: Any, at: Any, kind: Any, align: int) -> Any:
            loaded = builder.load(builder.bitcast(builder.gep(data, [at]), kind.as_pointer()))
            loaded.align = align
            return loaded

        i, v = arguments[1], arguments[3]
        x, matrix, y = (context.make_array(signature.args[k])(context, builder, arguments[k]) for k in (0, 2, 4))
        width, outputs = (builder.extract_value(array.shape, 1) for array in (x, y))
        left = [row(x.data, i, offset, width) for offset in range(rows)]
        right = [row(matrix.data, v, offset, width) for offset in range(columns)]
        tile = [(r, c) for r in range(rows) for c in range(columns)]
        sums = {place: cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for place in tile}
        kind = ir.FunctionType(vector, [vector] * 3)
        multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{_LANES}f32")
        with cgutils.for_range(builder, builder.udiv(width, number(_LANES))) as loop:
            at = builder.mul(loop.index, number(_LANES))
            weights = []
            for data in right:
                if packed:
                    wide = builder.zext(load(data, at, halves, 2), bits)
                    weights.append(builder.bitcast(builder.shl(wide, ir.Constant(bits, [16] * _LANES)), vector))
                else:
                    weights.append(load(data, at, vector, 4))
            values = [load(data, at, vector, 4) for data in left]
            for r, c in tile:
                total = builder.call(multiply_add, [values[r], weights[c], builder.load(sums[r, c])])
                builder.store(total, sums[r, c])
        for r, c in tile:
            total, lanes = builder.load(sums[r, c]), _LANES
            while lanes > 1:
                lanes //= 2
                parts = [
                    builder.shuffle_vector(
                        total, total, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [*range(first, first + lanes)])
                    )
                    for first in (0, lanes)
                ]
                total = builder.fadd(*parts)
            place = builder.gep(row(y.data, i, r, outputs), [builder.add(v, number(c))])
            builder.store(builder.extract_element(total, ir.Constant(ir.IntType(32), 0)), place)
        return context.get_dummy_value()

    @intrinsic
    def products(_typing: Any, x: Any, _i: Any, matrix: Any, _v: Any, y: Any) -> Any:
        if any(array.layout != "C" for array in (x, matrix, y)):
            raise TypingError("rows must lie one after the other")
        return types.void(x, types.intp, matrix, types.intp, y), generate

    return products


_four_by_two, _three_by_two, _two_by_four, _one_by_four, _one_by_one = (
    _make_products(*size, packed=False) for size in ((4, 2), (3, 2), (2, 4), (1, 4), (1, 1))
)
_packed_three_by_two, _packed_two_by_four, _packed_one_by_four, _packed_one_by_one = (
    _make_products(*size, packed=True) for size in ((3, 2), (2, 4), (1, 4), (1, 1))
)


@njit(cache=True, nogil=True)
def _fill_columns(x: Singles, weight: Singles, whole: int, y: Singles) -> None:  # pragma: no cover - compiled
    """The first ``whole`` columns of a product, four at once."""
    fours, over = x.shape[0] // 4 * 4, x.shape[0] % 4
    for v in range(0, whole, 4):
        for i in range(0, fours, 4):
            _four_by_two(x, i, weight, v, y)
            _four_by_two(x, i, weight, v + 2, y)
        if over == 1:
            _one_by_four(x, fours, weight, v, y)
        elif over == 2:
            _two_by_four(x, fours, weight, v, y)
        elif over == 3:
            _three_by_two(x, fours, weight, v, y)
            _three_by_two(x, fours, weight, v + 2, y)


@njit(cache=True, nogil=True)
def _fill_columns_packed(x: Singles, words: Any, whole: int, y: Singles) -> None:  # pragma: no cover - compiled
    """The same of one to three rows by a matrix in bf16."""
    for v in range(0, whole, 4):
        if x.shape[0] == 1:
            _packed_one_by_four(x, 0, words, v, y)
        elif x.shape[0] == 2:
            _packed_two_by_four(x, 0, words, v, y)
        else:
            _packed_three_by_two(x, 0, words, v, y)
            _packed_three_by_two(x, 0, words, v + 2, y)


@njit(cache=True, nogil=True)
def project_rows(x: Singles, matrix: Matrix) -> Singles:  # pragma: no cover - compiled
    """``x @ weight.T``: [n, D] and [V, D] to [n, V], a row's bits the same for every n and with words or without.

    A few rows take as long as the matrix takes to read, and words are half as much; many take as long as multiplying
    does, and words would have to be widened.
    """
    weight, words = matrix
    count, outputs = x.shape[0], weight.shape[0]
    packed, whole = words.shape[0] > 0 and 0 < count < 4, outputs // 4 * 4
    y = np.empty((count, outputs), np.float32)
    if packed:
        _fill_columns_packed(x, words, whole, y)
    else:
        _fill_columns(x, weight, whole, y)
    for v in range(whole, outputs):
        for i in range(count):
            if packed:
                _packed_one_by_one(x, i, words, v, y)
            else:
                _one_by_one(x, i, weight, v, y)
    for k in range(x.shape[1] // _LANES * _LANES, x.shape[1]):
        for i in range(count):
            for v in range(outputs):
                y[i, v] += x[i, k] * weight[v, k]
    return y


@njit(cache=True, nogil=True)
def norm_rows(x: Singles, weight: Singles, eps: float) -> Singles:  # pragma: no cover - compiled
    """RMS normalisation of the rows of x [n, D]."""
    y = np.empty_like(x)
    for i in range(x.shape[0]):
        scale = np.float32(1.0 / math.sqrt(_dot(x[i], x[i]) / x.shape[1] + eps))
        for d in range(x.shape[1]):
            y[i, d] = x[i, d] * scale * weight[d]
    return y


@njit(cache=True, nogil=True, fastmath=_VECTORS, error_model="numpy")
def _add_tap(total: Singles, values: Singles, weight: Singles) -> None:  # pragma: no cover - compiled
    for c in range(total.shape[0]):
        total[c] += values[c] * weight[c]


@njit(cache=True, nogil=True, fastmath=_VECTORS, error_model="numpy")
def _add_taps(
    total: Singles, one: Singles, by_one: Singles, other: Singles, by_other: Singles
) -> None:  # pragma: no cover - compiled
    """Two at once; more than that would not become vector instructions."""
    for c in range(total.shape[0]):
        total[c] += one[c] * by_one[c] + other[c] * by_other[c]


@njit(cache=True, nogil=True, fastmath=_VECTORS, error_model="numpy")
def _silu(values: Singles) -> None:  # pragma: no cover - compiled
    for c in range(values.shape[0]):
        values[c] = values[c] / (_ONE + _exp(-values[c]))


@njit(cache=True, nogil=True, fastmath=_VECTORS, error_model="numpy")
def _skip_and_gate(y: Singles, x: Singles, skip: np.float32, z: Singles) -> None:  # pragma: no cover - compiled
    """``(y + D x) * silu(z)`` of one head at one position, in place."""
    for p in range(y.shape[0]):
        y[p] = (y[p] + skip * x[p]) * (z[p] / (_ONE + _exp(-z[p])))


@njit(cache=True, nogil=True)
def _scale_keys(
    mixed: Singles, inner: int, d_state: int, columns: int, levels: Integers, level_scale: Singles
) -> None:  # pragma: no cover - compiled
    """Scale C for the level of ``columns``, and zero the columns of B and C that do not run."""
    if columns == d_state:
        return
    scale = _ONE
    for level in range(level_scale.shape[0]):
        if levels[level] == columns:
            scale = level_scale[level]
    for n in range(d_state):
        mixed[inner + n] *= np.float32(n < columns)
        mixed[inner + d_state + n] *= scale * np.float32(n < columns)


@njit(cache=True, nogil=True)
def _step_size(
    raw: np.float32, exponent: np.float32, log_stretch: np.float32, least: float, most: float
) -> np.float32:  # pragma: no cover - compiled
    """dt: softplus, limits, stretch."""
    size = float(max(raw, np.float32(0.0)) + np.float32(math.log1p(math.exp(-abs(raw)))))
    return np.float32(min(max(size, least), most) * math.exp(exponent * log_stretch))


@njit(cache=True, nogil=True, fastmath=_VECTORS)
def _advance_head(
    state: Singles,
    columns: int,
    x: Singles,
    key: Singles,
    query: Singles,
    step: np.float32,
    decay: np.float32,
    out: Singles,
) -> None:  # pragma: no cover - compiled
    """One position of one head: state [P, N] in place, ``out`` [P] written.

    Only the columns that run are touched: the bits of a row must not depend on how wide its neighbours are.
    """
    for p in range(x.shape[0]):
        added = step * x[p]
        row = state[p]
        read = np.float32(0.0)
        for n in range(columns):
            value = row[n] * decay + added * key[n]
            row[n] = value
            read += value * query[n]
        out[p] = read


def _make_head_update(vectors: int, *, written: bool) -> Any:
    """Compiled code for ``vectors * _LANES`` columns of a head's state [P, N] from one on, in place: they decay.

    ``written``: ``step * x`` times ``key`` is added. Written in LLVM's vectors, since a compiler that cannot know
    whether its arguments overlap asks at every row, which takes as long as the row.

    Raises:
        TypingError: when it is compiled, for an array whose rows do not lie one after the other.
    """
    vector = ir.VectorType(ir.FloatType(), _LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def place(data: Any, at: Any) -> Any:
            return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())

        def load(pointer: Any) -> Any:
            loaded = builder.load(pointer)
            loaded.align = 4
            return loaded

        def everywhere(value: Any) -> Any:
            nothing, lanes = ir.Constant(vector, ir.Undefined), ir.VectorType(ir.IntType(32), _LANES)
            one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(one, nothing, ir.Constant(lanes, [0] * _LANES))

        first, step, decay = arguments[1], arguments[4], everywhere(arguments[5])
        state, x, key = (context.make_array(signature.args[k])(context, builder, arguments[k]) for k in (0, 2, 3))
        offsets = [context.get_constant(types.intp, _LANES * v) for v in range(vectors)]
        keys = [load(place(key.data, builder.add(first, offset))) for offset in offsets] if written else []
        kind = ir.FunctionType(vector, [vector] * 3)
        multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{_LANES}f32")
        width = builder.extract_value(state.shape, 1)
        with cgutils.for_range(builder, builder.extract_value(state.shape, 0)) as loop:
            row = builder.add(builder.mul(loop.index, width), first)
            if written:
                added = everywhere(builder.fmul(step, builder.load(builder.gep(x.data, [loop.index]))))
            for v, offset in enumerate(offsets):
                pointer = place(state.data, builder.add(row, offset))
                value = builder.fmul(load(pointer), decay)
                if written:
                    value = builder.call(multiply_add, [added, keys[v], value])
                builder.store(value, pointer).align = 4
        return context.get_dummy_value()

    @intrinsic
    def update(_typing: Any, state: Any, _first: Any, x: Any, key: Any, _step: Any, _decay: Any) -> Any:
        if any(array.layout != "C" for array in (state, x, key)):
            raise TypingError("rows must lie one after the other")
        return types.void(state, types.intp, x, key, types.float32, types.float32), generate

    return update


_write_two, _write_one = (_make_head_update(vectors, written=True) for vectors in (2, 1))
_fade_two, _fade_one = (_make_head_update(vectors, written=False) for vectors in (2, 1))


@njit(cache=True, nogil=True)
def _write_head(
    state: Singles, last: int, x: Singles, key: Singles, step: np.float32, decay: np.float32
) -> None:  # pragma: no cover - compiled
    """One position of one head that is not asked for its output, in the columns up to ``last``."""
    n = 0
    while n + 2 * _LANES <= last:
        _write_two(state, n, x, key, step, decay)
        n += 2 * _LANES
    if n + _LANES <= last:
        _write_one(state, n, x, key, step, decay)
        n += _LANES
    if n < last:
        for p in range(x.shape[0]):
            for k in range(n, last):
                state[p, k] = state[p, k] * decay + step * x[p] * key[k]


@njit(cache=True, nogil=True)
def _fade_head(state: Singles, first: int, last: int, decay: np.float32) -> None:  # pragma: no cover - compiled
    """The decay of several positions at once, in the columns from ``first`` to ``last``."""
    n, row = first, state[0]  # which is not read
    while n + 2 * _LANES <= last:
        _fade_two(state, n, row, row, _ONE, decay)
        n += 2 * _LANES
    if n + _LANES <= last:
        _fade_one(state, n, row, row, _ONE, decay)
        n += _LANES
    if n < last:
        for p in range(state.shape[0]):
            for k in range(n, last):
                state[p, k] *= decay


@njit(cache=True, nogil=True, fastmath=_VECTORS)
def _advance_head_traced(
    state: Singles,
    columns: int,
    x: Singles,
    key: Singles,
    query: Singles,
    step: np.float32,
    decay: np.float32,
    out: Singles,
) -> np.float32:  # pragma: no cover - compiled
    """The same, and the squared norm of the state's change."""
    change = np.float32(0.0)
    for p in range(x.shape[0]):
        added = step * x[p]
        row = state[p]
        read, moved = np.float32(0.0), np.float32(0.0)
        for n in range(columns):
            old = row[n]
            value = old * decay + added * key[n]
            row[n] = value
            read += value * query[n]
            moved += (value - old) * (value - old)
        out[p] = read
        change += moved
    return change


@njit(cache=True, nogil=True)
def _convolve(
    projected: Singles,
    order: Integers,
    window: Singles,
    start: int,
    end: int,
    inner: int,
    by_tap: Singles,
    bias: Singles,
    first: int,
    last: int,
    out: Singles,
) -> None:  # pragma: no cover - compiled
    """Convolution and activation of the channels ``first`` to ``last`` at the positions ``start`` to ``end``.

    Args:
        projected: [R, z | x B C | dt], z of size ``inner``. order: [L] the row of each position.
        window: [d_conv - 1, C] what came before them. by_tap: [d_conv, C]. bias: [C]. out: [end - start, last - first].
    """
    taps, low, high = by_tap.shape[0], inner + first, inner + last
    for t in range(start, end):
        row, at, paired = out[t - start], t - (taps - 1), 0
        row[:] = bias[first:last]
        if at >= 0:
            paired = taps // 2 * 2
            for k in range(0, paired, 2):
                one, other = projected[order[at + k], low:high], projected[order[at + k + 1], low:high]
                _add_taps(row, one, by_tap[k, first:last], other, by_tap[k + 1, first:last])
        for k in range(paired, taps):
            if at + k >= 0:
                _add_tap(row, projected[order[at + k], low:high], by_tap[k, first:last])
            else:
                _add_tap(row, window[at + k + taps - 1, first:last], by_tap[k, first:last])
        _silu(row)


@njit(cache=True, nogil=True)
def keep_window(
    projected: Singles, order: Integers, lengths: Integers, conv_state: Singles, inner: int
) -> None:  # pragma: no cover - compiled
    """Advance conv_state [B, d_conv - 1, C] in place by the first ``lengths`` [B] positions; see :func:`mixer_rows`."""
    kept, channels = conv_state.shape[1:]
    for b in range(order.shape[0]):
        for k in range(kept):
            at = lengths[b] + k - kept
            if at >= 0:
                conv_state[b, k] = projected[order[b, at], inner : inner + channels]
            else:
                conv_state[b, k] = conv_state[b, at + kept]


@njit(cache=True, nogil=True)
def mixer_rows(
    first: int,
    last: int,
    projected: Singles,
    order: Integers,
    log_stretch: Singles,
    places: Integers,
    lengths: Integers,
    columns: Integers,
    conv_state: Singles,
    ssm_state: Singles,
    before: Singles,
    mixed: Singles,
    steps: Singles,
    changes: Singles,
    gated: Singles,
    chunk_size: int,
    levels: Integers,
    level_scale: Singles,
    conv: Singles,
    per_head: Singles,
    least_dt: float,
    most_dt: float,
) -> None:  # pragma: no cover - compiled
    """Convolution, recurrence and gate of the heads ``first`` to ``last``, over L positions.

    A head's state stays in the nearest cache from the first position to the last. At the sizes of a small model that is
    less work than the matrix products of a chunked scan. B and C, which all heads read, are convolved by everyone
    who does a share of the heads.

    Args:
        projected: [R, z | x B C | dt]. order: [B, L] the row of each position in it.
        log_stretch: [B, L] logarithm of the bytes that a step stands for.
        places: [B, L] where in ``gated`` the output of a position goes; below 0 where the block is not run and its
            state reads what was propagated, which stands in ``projected`` without a z.
        lengths: [B] positions that count. columns: [B] of the state that run, at most N.
        conv_state: [B, d_conv - 1, C] before the first position, not changed.
        ssm_state: [B, H, P, N], advanced in place.
        before: [B, c, H, P, N], filled with the state before each chunk of ``chunk_size`` positions that counts,
            mixed: [B, L, x | B | C], with what was convolved, steps: [B, H, L], with dt, and changes: [B, H, L], with
            the squared norm of the state's change; nobody wants them where c is 0. By head, since threads that write
            side by side wait for each other.
        gated: [B, K, HP], filled with gated outputs where a position counts.
        levels: sizes that the state may run at. level_scale: of C at each of them but the last.
        conv: [d_conv + 1, C] weights of the convolution by tap, then its bias.
        per_head: [4, H] dt_bias, A_log, D, and the exponent of the stretch. Few arrays, since each costs a call 0.1 us.
        least_dt, most_dt: limits of the step size.
    """
    (heads, headdim), channels = ssm_state.shape[1:3], conv.shape[1]
    by_tap, conv_bias = conv[:-1], conv[-1]
    dt_bias, A_log, D, exponent = per_head[0], per_head[1], per_head[2], per_head[3]
    inner = heads * headdim
    d_state = (channels - inner) // 2
    low, high = first * headdim, last * headdim
    traced = before.shape[1] > 0
    keys = np.empty((_REACH, channels - inner), np.float32)
    inputs = np.empty((_REACH, high - low), np.float32)
    faded = np.empty(heads, np.float32)  # what the columns that are not written between still have to be multiplied by
    for b in range(order.shape[0]):
        count, at, window = lengths[b], order[b], conv_state[b]
        written = min(columns[b], levels[0])
        faded[:] = _ONE
        for start in range(0, count, _REACH):
            end = min(start + _REACH, count)
            _convolve(projected, at, window, start, end, inner, by_tap, conv_bias, inner, channels, keys)
            _convolve(projected, at, window, start, end, inner, by_tap, conv_bias, low, high, inputs)
            for t in range(start, end):
                _scale_keys(keys[t - start], 0, d_state, columns[b], levels, level_scale)
                if traced:
                    mixed[b, t, low:high] = inputs[t - start]
                    if first == 0:
                        mixed[b, t, inner:] = keys[t - start]
            for h in range(first, last):
                now, part = ssm_state[b, h], slice(h * headdim, (h + 1) * headdim)
                own, rate = slice((h - first) * headdim, (h - first + 1) * headdim), math.exp(A_log[h])
                for t in range(start, end):
                    if traced and t % chunk_size == 0:
                        before[b, t // chunk_size, h] = now
                    size = projected[at[t], inner + channels + h] + dt_bias[h]
                    size = _step_size(size, exponent[h], log_stretch[b, t], least_dt, most_dt)
                    x, key, place = inputs[t - start, own], keys[t - start], places[b, t]
                    query, decay = key[d_state:], np.float32(math.exp(-size * rate))
                    if place < 0:
                        _write_head(now, written, x, key, size, decay)
                        faded[h] *= decay
                        continue
                    if faded[h] != _ONE:
                        _fade_head(now, written, columns[b], faded[h])
                        faded[h] = _ONE
                    out = gated[b, place, part]
                    if traced:
                        steps[b, h, t] = size
                        changes[b, h, t] = _advance_head_traced(now, columns[b], x, key, query, size, decay, out)
                    else:
                        _advance_head(now, columns[b], x, key, query, size, decay, out)
                    _skip_and_gate(out, x, D[h], projected[at[t], part])
        for h in range(first, last):
            if faded[h] != _ONE:
                _fade_head(ssm_state[b, h], written, columns[b], faded[h])


@njit(cache=True, nogil=True)
def hold_rows(
    fired: Booleans,
    rates: Floats,
    hidden: Singles,
    raw_fading: Singles,
    held: Singles,
    last_fire: Integers,
    fires: Integers,
    quota: Floats,
    positions: Integers,
) -> Singles:  # pragma: no cover - compiled
    """``hidden + rho(age) * held`` [B, D] after accounting for one byte: the twin of ``advance`` and ``fade``.

    Args:
        fired: [B]. rates: [B]. hidden: [B, D]. raw_fading: [D]. held: [B, D].
        last_fire, fires, quota, positions: [B] the router's state, advanced in place.
    """
    output = hidden.copy()
    power = np.empty_like(raw_fading)
    for d in range(power.shape[0]):
        power[d] = max(raw_fading[d], np.float32(0.0)) + np.float32(math.log1p(math.exp(-abs(raw_fading[d]))))
    for b in range(fired.shape[0]):
        positions[b] += 1
        quota[b] += rates[b]
        if fired[b]:
            fires[b] += 1
            last_fire[b] = positions[b]
            output[b] += held[b]  # age 0
            continue
        log_age = np.float32(math.log1p(positions[b] - last_fire[b]))
        for d in range(hidden.shape[1]):
            output[b, d] += np.float32(math.exp(-power[d] * log_age)) * held[b, d]
    return output


@njit(cache=True, nogil=True)
def _slide(
    mixed: Singles, window: Singles, new: Singles, by_tap: Singles, bias: Singles
) -> None:  # pragma: no cover - compiled
    """Fill ``mixed`` [C] with one position's convolution and activation; ``window`` [d_conv - 1, C] takes it in."""
    kept = window.shape[0]
    mixed[:] = bias
    for k in range(kept):
        _add_tap(mixed, window[k], by_tap[k])
    _add_tap(mixed, new, by_tap[kept])
    _silu(mixed)
    for k in range(kept - 1):
        window[k] = window[k + 1]
    window[kept - 1] = new


@njit(cache=True, nogil=True)
def block_rows(
    rows: Integers,
    hidden: Singles,
    log_stretch: Singles,
    columns: Integers,
    traced: bool,
    trace: tuple[Singles, Singles, Singles, Singles, Floats],
    levels: Integers,
    level_scale: Singles,
    conv: Singles,
    per_head: Singles,
    gate_norm: Singles,
    in_proj: Matrix,
    out_proj: Matrix,
    norm: Singles,
    least_dt: float,
    most_dt: float,
    gate_eps: float,
    eps: float,
    conv_state: Singles,
    ssm_state: Singles,
) -> None:  # pragma: no cover - compiled
    """One decoding step of a residual block for some rows of a batch; their state is advanced in place.

    Args:
        rows: [n] rows of the state. hidden: [n, D], the residual update is added in place.
        log_stretch: [n]. columns: [n].
        traced: whether the trace is wanted: what a :class:`~model.ops.ssd.StepTrace` holds, in its order, filled.
        norm: [D]. in_proj: [z | x B C | dt, D]. gate_norm: [HP]. out_proj: [D, HP].
        conv_state: [B, d_conv - 1, C]. ssm_state: [B, H, P, N]. All others as in :func:`mixer_rows`.
    """
    count = rows.shape[0]
    heads, headdim = ssm_state.shape[1:3]
    inner = heads * headdim
    channels = conv.shape[1]
    dt_bias, A_log, D, exponent = per_head[0], per_head[1], per_head[2], per_head[3]
    d_state = (channels - inner) // 2
    projected = project_rows(norm_rows(hidden, norm, eps), in_proj)
    gated = np.empty((count, inner), np.float32)
    mixed = np.empty(channels, np.float32)
    for i in range(count):
        _slide(mixed, conv_state[rows[i]], projected[i, inner : inner + channels], conv[:-1], conv[-1])
        _scale_keys(mixed, inner, d_state, columns[i], levels, level_scale)
        key, query, change = mixed[inner : inner + d_state], mixed[inner + d_state :], 0.0
        for h in range(heads):
            now, part = ssm_state[rows[i], h], slice(h * headdim, (h + 1) * headdim)
            size = projected[i, inner + channels + h] + dt_bias[h]
            size = _step_size(size, exponent[h], log_stretch[i], least_dt, most_dt)
            log_decay = np.float32(-size * math.exp(A_log[h]))
            x, out, decay = mixed[part], gated[i, part], np.float32(math.exp(log_decay))
            if traced:
                change += float(_advance_head_traced(now, columns[i], x, key, query, size, decay, out))
                trace[2][i, h], trace[3][i, h] = size, log_decay
            else:
                _advance_head(now, columns[i], x, key, query, size, decay, out)
            _skip_and_gate(out, x, D[h], projected[i, part])
        if traced:
            trace[0][i], trace[1][i], trace[4][i] = key, query, change
    hidden += project_rows(norm_rows(gated, gate_norm, gate_eps), out_proj)


@njit(cache=True, nogil=True)
def _read_codes(
    rows: Integers,
    starts: Integers,
    codes: Singles,
    columns: Integers,
    weight: Matrix,
    levels: Integers,
    conv: Singles,
    per_head: Singles,
    least_dt: float,
    most_dt: float,
    conv_state: Singles,
    ssm_state: Singles,
) -> None:  # pragma: no cover - compiled
    """Bytes read by the states of a block that was not run at them, for some rows of a batch, advanced in place.

    Args:
        rows: [n] rows of the state. codes: [m, r], of which those from ``starts[i]`` to ``starts[i + 1]`` are row i's.
        columns: [n]. weight: [x B C | dt, r]. All others as in :func:`block_rows`.
    """
    heads, headdim = ssm_state.shape[1:3]
    inner = heads * headdim
    channels = conv.shape[1]
    dt_bias, A_log = per_head[0], per_head[1]
    read = project_rows(codes, weight)
    mixed = np.empty((codes.shape[0], channels), np.float32)
    for i in range(rows.shape[0]):
        row, first, last = rows[i], starts[i], starts[i + 1]
        written = min(columns[i], levels[0])
        for t in range(first, last):
            _slide(mixed[t], conv_state[row], read[t, :channels], conv[:-1], conv[-1])
        for h in range(heads):
            now, rate, faded = ssm_state[row, h], math.exp(A_log[h]), _ONE
            for t in range(first, last):
                size = read[t, channels + h] + dt_bias[h]
                size = _step_size(size, np.float32(0.0), np.float32(0.0), least_dt, most_dt)
                decay = np.float32(math.exp(-size * rate))
                x = mixed[t, h * headdim : (h + 1) * headdim]
                _write_head(now, written, x, mixed[t, inner:], size, decay)
                faded *= decay
            _fade_head(now, written, columns[i], faded)


@njit(cache=True, nogil=True)
def read_waiting(
    chosen: Integers,
    rows: Integers,
    columns: Integers,
    depth: Integers,
    depths: Integers,
    codes: Singles,
    waiting: Integers,
    blocks: tuple[Any, ...],
    propagations: tuple[Matrix, ...],
) -> None:  # pragma: no cover - compiled
    """Let the trunk's states read what waits for them: for all blocks of a stage and bytes of a row at once.

    Read one by one, a state would pass through the caches at every byte, and so would the matrices.

    Args:
        chosen: those of n rows that read. rows: [n] rows of the states. columns: [n] of the state that run.
        depth: [n] blocks after which each row's stage ends, the one that reads. depths: those that there are, rising.
        codes: [n, W, r], of which the first ``waiting`` [n] count; none wait afterwards.
        blocks: as in :func:`decode_rows`. propagations: a matrix [x B C | dt, r] for each block of the trunk.
    """
    first = 0
    for last in depths:
        some = chosen[depth[chosen] == last]
        starts = np.zeros(len(some) + 1, np.int64)
        for i, row in enumerate(some):
            starts[i + 1] = starts[i] + waiting[row]
        together = np.empty((starts[-1], codes.shape[2]), np.float32)
        for i, row in enumerate(some):
            together[starts[i] : starts[i + 1]] = codes[row, : waiting[row]]
            waiting[row] = 0
        if len(some):
            places, sizes = rows[some], columns[some]
            for i in range(first, last):
                levels, _, conv, per_head = blocks[i][:4]
                _read_codes(
                    places, starts, together, sizes, propagations[i], levels, conv, per_head,
                    *blocks[i][8:10], *blocks[i][12:],
                )  # fmt: skip
        first = last


@njit(cache=True, nogil=True)
def encode_rows(
    tokens: Integers,
    embedding: Singles,
    rows: Integers,
    traced: bool,
    trace: tuple[Singles, Singles, Singles, Singles, Floats],
    blocks: tuple[Any, ...],
) -> Singles:  # pragma: no cover - compiled
    """Encoder outputs [n, D] of one step for some rows of a batch.

    Args:
        tokens: [n]. embedding: [V, D]. rows: [n] rows of the states. traced, trace: as in :func:`block_rows`.
        blocks: a tuple for each block, with the last arguments of :func:`block_rows`.
    """
    hidden = np.empty((tokens.shape[0], embedding.shape[1]), np.float32)
    for i in range(tokens.shape[0]):
        hidden[i] = embedding[tokens[i]]
    stretch = np.zeros(tokens.shape[0], np.float32)
    for i in range(len(blocks)):
        columns = np.full(tokens.shape[0], blocks[i][-1].shape[3])
        block_rows(rows, hidden, stretch, columns, traced, trace, *blocks[i])
    return hidden


@njit(cache=True, nogil=True)
def _no_trace() -> tuple[Singles, Singles, Singles, Singles, Floats]:  # pragma: no cover - compiled
    """What stands in for the trace of a block of which none is wanted."""
    nothing = np.empty((0, 0), np.float32)
    return nothing, nothing, nothing, nothing, np.empty(0)


@njit(cache=True, nogil=True)
def _gather(values: Singles, index: Integers) -> Singles:  # pragma: no cover - compiled
    """The rows ``index`` [k] of ``values`` [n, D], copied: for so few, loops are faster than fancy indexing."""
    gathered = np.empty((len(index), values.shape[1]), np.float32)
    for i, row in enumerate(index):
        gathered[i] = values[row]
    return gathered


@njit(cache=True, nogil=True)
def _project_between(x: Singles, matrix: Matrix) -> Singles:  # pragma: no cover - compiled
    """``x`` from one width to the other, itself where the widths are equal and there is no matrix."""
    return project_rows(x, matrix) if matrix[0].shape[0] else x


@njit(cache=True, nogil=True)
def _run_stage(
    index: Integers,
    log_stretch: Singles,
    entered: Singles,
    rows: Integers,
    columns: Integers,
    first: int,
    last: int,
    blocks: tuple[Any, ...],
    up: Matrix,
) -> tuple[Singles, Singles]:  # pragma: no cover - compiled
    """What the blocks from ``first`` up to ``last`` leave in the trunk [k, d_trunk], and what they add [k, d_model].

    Args:
        index: [k] those of n rows for which they run. log_stretch: [k]. entered: [k, d_trunk].
        up: [d_model, d_trunk], empty where the widths are equal. All others as in :func:`decode_rows`.
    """
    left, trace = entered.copy(), _no_trace()
    places, sizes = rows[index], columns[index]
    for i in range(first, last):
        block_rows(places, left, log_stretch, sizes, False, trace, *blocks[i])
    return left, _project_between(left - entered, up)


@njit(cache=True, nogil=True)
def enter_rows(
    rows: Integers,
    columns: Integers,
    depth: Integers,
    depths: Integers,
    hidden: Singles,
    blocks: tuple[Any, ...],
    down: Matrix,
    ups: tuple[Matrix, ...],
) -> Singles:  # pragma: no cover - compiled
    """Run the stages below the one that is placed, for the rows that have some; what they leave [n, d_trunk].

    Args:
        rows, columns, depth, depths, blocks, down, ups: as in :func:`decode_rows`.
        hidden: [n, d_model] encoder outputs, to which is added what the stages add.
    """
    left = np.empty((len(rows), down[0].shape[0] if down[0].shape[0] else hidden.shape[1]), np.float32)
    first = 0
    for k in range(len(depths) - 1):
        some = np.flatnonzero(depth > depths[k])
        if not len(some):
            break
        entered = _project_between(_gather(hidden, some), down) if k == 0 else _gather(left, some)
        stretch = np.zeros(len(some), np.float32)
        after, update = _run_stage(some, stretch, entered, rows, columns, first, depths[k], blocks, ups[k])
        for i, row in enumerate(some):
            left[row] = after[i]
            hidden[row] += update[i]
        first = depths[k]
    return left


@njit(cache=True, nogil=True)
def _make_codes(
    skipping: Integers, given: Singles, eps: float, code: Matrix, codes: Singles, waiting: Integers
) -> None:  # pragma: no cover - compiled
    """Let the codes of what a stage is ``given`` [n, D] wait, for the rows ``skipping`` [k] where it does not run."""
    skipped = _gather(given, skipping)
    new = project_rows(norm_rows(skipped, np.ones(given.shape[1], np.float32), eps), code)
    for i, row in enumerate(skipping):
        codes[row, waiting[row]] = new[i]
        waiting[row] += 1


@njit(cache=True, nogil=True)
def decode_rows(
    fired: Booleans,
    rates: Floats,
    hidden: Singles,
    left: Singles,
    rows: Integers,
    columns: Integers,
    depth: Integers,
    depths: Integers,
    blocks: tuple[Any, ...],
    decoders: int,
    propagations: tuple[Matrix, ...],
    code: tuple[Matrix, ...],
    down: Matrix,
    ups: tuple[Matrix, ...],
    raw_fading: Singles,
    final_norm: Singles,
    eps: float,
    head: Matrix,
    held: Singles,
    last_fire: Integers,
    fires: Integers,
    quota: Floats,
    positions: Integers,
    codes: Singles,
    waiting: Integers,
) -> Singles:  # pragma: no cover - compiled
    """Logits [n, V] of one step from the encoder outputs: the placed stage where it fires, hold, decoder and head.

    Args:
        fired: [n]. rates: [n]. rows: [n] rows of the blocks' states. columns: [n] of the trunk's state that run.
        hidden: [n, d_model] encoder outputs and what the stages below add. left: [n, d_trunk], of :func:`enter_rows`;
            not read of rows in the first stage.
        depth: [n] blocks of the trunk that run. depths: those that there are, rising.
        blocks: a tuple for each block of trunk and decoders, as of :func:`encode_rows`.
        decoders: how many, each of as many blocks: one for all rows, or one for each stage.
        propagations: a matrix [x B C | dt, r] for each block of the trunk, and code: [r, D] for each stage; empty where
            the states do not read what the trunk skips.
        down: [d_trunk, d_model] of the router, and ups: [d_model, d_trunk] for each stage; empty where the widths are
            equal.
        head: [V, d_model]. codes, waiting: as in :func:`read_waiting`. All others as in :func:`hold_rows`.
    """
    trace, propagates = _no_trace(), code[0][0].shape[0] > 0
    between = (rates > 0.0) & ~fired
    if propagates:
        due = np.flatnonzero(fired & (waiting > 0) | between & (waiting == codes.shape[1]))
        if len(due):
            read_waiting(due, rows, columns, depth, depths, codes, waiting, blocks, propagations)
    first = 0
    for k in range(len(depths)):
        last, given = depths[k], hidden if k == 0 else left
        if propagates:
            skipping = np.flatnonzero(between & (depth == last))
            if len(skipping):
                _make_codes(skipping, given, eps, code[k], codes, waiting)
        index = np.flatnonzero(fired & (depth == last))
        if len(index):
            entered = _gather(given, index)
            entered = _project_between(entered, down) if k == 0 else entered
            stretch = np.zeros(len(index), np.float32)
            if not propagates:
                for i, row in enumerate(index):
                    stretch[i] = math.log(positions[row] + 1 - last_fire[row])
            _, update = _run_stage(index, stretch, entered, rows, columns, first, last, blocks, ups[k])
            for i, row in enumerate(index):
                held[row] = update[i]
        first = last
    output = hold_rows(fired, rates, hidden, raw_fading, held, last_fire, fires, quota, positions)
    each = (len(blocks) - depths[-1]) // decoders
    for k in range(decoders):
        index = np.flatnonzero(depth == depths[k]) if decoders > 1 else np.arange(len(rows))
        if each and len(index):
            read, places, stretch = _gather(output, index), rows[index], np.zeros(len(index), np.float32)
            for i in range(depths[-1] + k * each, depths[-1] + (k + 1) * each):
                block_rows(places, read, stretch, np.full(len(index), blocks[i][-1].shape[3]), False, trace, *blocks[i])
            for i, row in enumerate(index):
                output[row] = read[i]
    return project_rows(norm_rows(output, final_norm, eps), head)
