"""Views of parameters for compiled code, which cannot read modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from torch import Tensor, nn

Views = TypeVar("Views")


class Viewed(nn.Module, Generic[Views]):
    """A module that makes the views of its parameters once; their values may change, as in training.

    A step of a small model takes half a millisecond, and asking its modules for every parameter would take half of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._views: Views | None = None

    def views(self) -> Views:
        """What compiled code reads of the module; valid until it is moved, cast or resized."""
        if self._views is None:
            self._views = self._make_views()
        return self._views

    def _make_views(self) -> Views:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moving or casting a module replaces its parameters."""
        self._views = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a module has parameters of its own, which the views of this one do not show."""
        return {**self.__dict__, "_views": None}


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
    chunk_size: int
    mixer: tuple[Any, ...]
    """The last arguments of :func:`~model.ops.recurrent.mixer_rows`, from the levels on."""
    step: tuple[Any, ...]
    """Those of :func:`~model.ops.recurrent.block_rows`, from the levels up to the state."""
