"""Stopping between two steps when the process is told to."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ECHO_SECONDS = 3.0
"""So soon after it came first, a signal is the same request: systemd and Slurm send one to every process of a run, and
``torchrun`` passes its own on to those that had it already."""


class StopRequest:
    """Notes SIGINT and SIGTERM instead of dying of them, while it is entered; the same signal later acts as ever.

    For the main thread, where Python handles signals.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first one received."""
        self._received: dict[int, float] = {}
        """When each was received first."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        self.signal = self.signal or number
        if now - self._received.setdefault(number, now) > ECHO_SECONDS:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
