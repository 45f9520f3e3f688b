"""Stopping between two steps when the process is told to."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes SIGINT and SIGTERM instead of dying of them, while it is entered; the same signal again acts as ever.

    For the main thread, where Python handles signals.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first one received."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number
        signal.signal(number, self._before[number])
