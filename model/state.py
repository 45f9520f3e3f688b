"""The state of running sequences: dataclasses of tensors with one row per sequence (or per slot of a pool)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(slots=True)
class Rows:
    """Base of every state: nested dataclasses and tuples of tensors whose first axis is the sequence."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in declaration order."""
        for field in fields(self):
            value = getattr(self, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Rows):
                    yield from part.tensors()
                else:
                    yield part

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A state of the same structure with ``function`` applied to every tensor."""

        def apply(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(apply(part) for part in value)
            if isinstance(value, Rows):
                return value.map(function)
            assert isinstance(value, Tensor)
            return function(value)

        return type(self)(*(apply(getattr(self, field.name)) for field in fields(self)))

    @property
    def nbytes(self) -> int:
        """Bytes held by all rows."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def gather(self, index: Tensor) -> Self:
        """A copy of the rows ``index`` (LongTensor [n])."""
        return self.map(lambda tensor: tensor.index_select(0, index))

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The rows of all ``parts`` (at least one), in order, copied."""
        columns = zip(*(part.tensors() for part in parts), strict=True)
        return parts[0].map(lambda _: torch.cat(next(columns)))

    def scatter_(self, index: Tensor, rows: Self) -> None:
        """Overwrite the rows ``index`` (LongTensor [n]) with ``rows``, in place."""
        for mine, other in zip(self.tensors(), rows.tensors(), strict=True):
            mine.index_copy_(0, index, other)

    def part(self, start: int, end: int) -> Self:
        """The rows from ``start`` up to ``end``, sharing memory."""
        return self.map(lambda tensor: tensor[start:end])

    def copy_row_(self, row: int, other: Self, source: int) -> None:
        """Overwrite one row with the row ``source`` of ``other``, in place."""
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            mine[row] = new[source]

    def copy_(self, other: Self) -> None:
        """Overwrite every row with the rows of ``other``, in place."""
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(new)


class _Kept:
    """Room for what a state keeps beside its tensors."""

    __slots__ = ("_arrays",)

    _arrays: tuple[Any, Any]


@dataclass(slots=True)
class BlockState(Rows, _Kept):
    """State of one Mamba-2 block; its tensors are written in place, never replaced."""

    conv_state: Tensor
    """[B, d_conv - 1, conv_dim] the last inputs of the convolution, before it."""
    ssm_state: Tensor
    """[B, H, P, N] fp32."""

    def arrays(self) -> tuple[Any, Any]:
        """The two as numpy arrays of the same memory, made once: a step of one stream would notice."""
        try:
            return self._arrays
        except AttributeError:
            self._arrays = self.conv_state.numpy(), self.ssm_state.numpy()  # type: ignore[misc]  # a slot of _Kept
            return self._arrays

    def __reduce__(self) -> tuple[type[BlockState], tuple[Tensor, Tensor]]:
        """A copy has tensors of its own, and no arrays yet."""
        return BlockState, (self.conv_state, self.ssm_state)


@dataclass(slots=True)
class DensityState(Rows):
    """What the density analyzer remembers: a window of keys, and everything older as one lump."""

    keys: Tensor
    """[B, W, N] the last W keys (B of the encoder's last block), oldest first."""
    weights: Tensor
    """[B, W, H] ``dt`` of those positions; 0 where the window reaches before the analysis began."""
    log_decay: Tensor
    """[B, W, H] ``dt * A`` of those positions."""
    mass: Tensor
    """[B, H] decayed sum of ``dt * |key|`` over every position so far."""
    seen: Tensor
    """[B] int64, positions analysed."""
    level: Tensor
    """[B] float64, the smoothed density at the last of them, in bits."""


@dataclass(slots=True)
class RouterState(Rows):
    """What the router holds between fires, and the pacing of fires."""

    held: Tensor
    """[B, d_model] the last update, at outer width, of the stage that is placed; 0 before its first fire."""
    last_fire: Tensor
    """[B] int64, one more than the position of the last fire; 0 before the first."""
    fires: Tensor
    """[B] int64, fires so far under the pacing controller."""
    quota: Tensor
    """[B] float64, fires allowed so far: the sum of the rate over the positions read."""
    positions: Tensor
    """[B] int64, positions read so far."""
    codes: Tensor
    """[B, W, propagation_rank] of bytes at which the trunk did not run and that its states have still to read: steps on
    a CPU put it off until it runs, or W wait."""
    waiting: Tensor
    """[B] int64, how many of them there are."""


@dataclass(slots=True)
class ModelState(Rows):
    """Everything an :class:`~model.lm.AdaptiveAttentionSystem` carries between calls; zero at the start but for
    ``columns`` and ``depth``.
    """

    encoder: tuple[BlockState, ...]
    trunk: tuple[BlockState, ...]
    decoder: tuple[BlockState, ...]
    density: DensityState
    router: RouterState
    columns: Tensor
    """[B] int64, columns of the trunk's ssm_state that run; those beyond are zero."""
    depth: Tensor
    """[B] int64, blocks of the trunk that run, those of the stages below at every byte; the states of those beyond read
    nothing."""


def zero_block_state(
    batch: int, conv_dim: int, d_conv: int, heads: int, headdim: int, d_state: int, device: torch.device
) -> BlockState:
    """The state of a block that has read nothing."""
    return BlockState(
        conv_state=torch.zeros(batch, d_conv - 1, conv_dim, device=device),
        ssm_state=torch.zeros(batch, heads, headdim, d_state, device=device),
    )
