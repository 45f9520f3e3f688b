"""Views of parameters for compiled code, which cannot read modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

from torch import Tensor, nn

Views = TypeVar("Views")


class Viewed(nn.Module, Generic[Views]):
    """A module that makes the views of its parameters once and keeps them in evaluation mode.

    A view may be a copy in another layout: whoever changes weights by hand there calls ``eval()`` again. A step of a
    small model takes half a millisecond; asking its modules for every parameter takes an eighth more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._views: Views | None = None

    def views(self) -> Views:
        """What compiled code reads of the module; valid until it is moved, cast, resized, loaded or trained."""
        if self._views is None or self.training:
            self._views = self._make_views()
        return self._views

    def _make_views(self) -> Views:
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """What is trained changes, and so do its views."""
        self._views = None
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._views = None
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moving or casting a module replaces its parameters."""
        self._views = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a module has parameters of its own, which the views of this one do not show."""
        return {**self.__dict__, "_views": None}
