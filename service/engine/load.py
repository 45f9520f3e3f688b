"""How busy the engine is: how far flexible requests are lowered, and how long a new one would wait.

Plain Python, no clock: every method is told the time in seconds.
"""

from __future__ import annotations

import math

_HORIZON = 5.0
"""Seconds of work, and the requests ended in them, over which averages reach back."""


class LoadControl:
    """Lowers what flexible requests are granted while others wait, in steps, and raises it again with hysteresis.

    One step down for every ``patience`` seconds in which some request has waited longer than that or was refused; one
    step up after ``CALM`` times that long in which none was refused or has waited a quarter of it.
    """

    STEPS = (1.0, 0.75, 0.5, 0.25, 0.0)
    """How much of the way from the least to the most that a request allows it is granted."""
    CALM = 4.0

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._step = 0
        self._since = 0.0
        """When the present spell of pressure or calm began, or last moved a step."""
        self._pressed: bool | None = None
        self._refused = -math.inf
        self._restless = 0.0
        """When it was last not calm."""

    @property
    def ease(self) -> float:
        """The present step: 1 grants what is asked for, 0 the least."""
        return self.STEPS[self._step]

    def refused(self, now: float) -> None:
        """Take note of a request for which there was no room. May be called from any thread."""
        self._refused = now

    def update(self, now: float, longest_wait: float) -> bool:
        """Take note of how long the request that waits longest has waited; whether ``ease`` has changed.

        Need not be called while there is nothing to do: that is a time of calm.
        """
        if math.isinf(self._patience):
            return False
        pressed = None
        if longest_wait > self._patience or now - self._refused < self._patience:
            pressed = True
        elif longest_wait < self._patience / 4.0:
            pressed = False
        if pressed is not self._pressed:
            # The first step down is taken at once: the wait itself was the spell.
            self._pressed, self._since = pressed, now - self._patience if pressed else self._restless
        if pressed is not False:
            self._restless = now
        if pressed is None:
            return False
        if pressed:
            steps = int(now - self._since >= self._patience)
        else:
            steps = -int((now - self._since) // (self._patience * self.CALM))
        before, self._step = self._step, min(max(self._step + steps, 0), len(self.STEPS) - 1)
        if self._step == before:
            return False
        self._since = now
        return True


class Pace:
    """Operations per second of work, and what share of its reserve a request comes to in the end."""

    def __init__(self) -> None:
        self._flops = self._seconds = 0.0
        self._used = self._reserved = 0.0

    def worked(self, flops: int, seconds: float) -> None:
        """Take note of a step."""
        keep = max(0.0, 1.0 - seconds / _HORIZON)
        self._flops = keep * self._flops + flops
        self._seconds = keep * self._seconds + seconds

    def ended(self, used: int, reserved: int) -> None:
        """Take note of a request that has ended by itself."""
        self._used = 0.9 * self._used + used
        self._reserved = 0.9 * self._reserved + reserved

    def seconds_for(self, reserved: int) -> float:
        """How long work takes for which so many operations were reserved; 0 while nothing is known."""
        if self._flops <= 0.0:
            return 0.0
        share = self._used / self._reserved if self._reserved else 1.0
        return reserved * share * self._seconds / self._flops
