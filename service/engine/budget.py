"""From the compute budget that a request asks for to the one it is granted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from model.cost import CostModel, Rates

NOT_ADAPTED = "this model was not adapted to budgets below 1: they are kept, but answers get worse"
"""What is said to those who run an unadapted model at less than full budget."""


class Reason(StrEnum):
    """Why a request was granted what it was granted."""

    REQUESTED = "requested"
    """As asked."""
    FLOOR = "floor"
    """The request asked for less than the model can do with: it runs without the trunk."""
    DEPTH = "depth"
    """The request asked for more than a stage of the trunk costs everywhere, and for too little to place the next."""
    MAXIMUM = "maximum"
    """The request's target is above what its API key may be granted, its minimum is not: it gets the maximum."""
    LOAD = "load"
    """The server is busy, and the request allows less than its target."""


class BudgetAboveMaximumError(ValueError):
    """Not even the least that a request would take may be granted to it."""


@dataclass(frozen=True, slots=True)
class ComputeBudget:
    """Shares of the full-resolution FLOPs of a request's bytes.

    Raises:
        ValueError: one is outside (0, 1], or ``minimum`` is above ``target``.
    """

    target: float
    minimum: float

    def __post_init__(self) -> None:
        for name, value in (("target", self.target), ("min", self.minimum)):
            if not (math.isfinite(value) and 0.0 < value <= 1.0):
                raise ValueError(f"{name} must be a number greater than 0 and at most 1, not {value}")
        if self.minimum > self.target:
            raise ValueError(f"min {self.minimum} must not be above target {self.target}")

    @classmethod
    def exactly(cls, share: float) -> ComputeBudget:
        """A budget that the server may not lower."""
        return cls(share, share)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request may spend."""

    requested: float
    granted: float
    reason: Reason
    rates: Rates
    """Trunk fires per byte that keep it."""
    highest: float
    """The most that the request may be granted: its target, or the maximum of its API key."""
    lowest: float
    """The least that the server may lower it to under load."""

    @property
    def flexible(self) -> bool:
        """Whether the request allows the server to lower it."""
        return self.lowest < self.highest

    @property
    def settled(self) -> bool:
        """Whether no places are chosen, and less than all is run: what is granted is then what is spent."""
        return self.rates.decode <= 0.0 or (self.rates.decode >= 1.0 and self.rates.depth is not None)

    def at(self, ease: float, cost: CostModel) -> Grant:
        """This grant where the load leaves so much of the way from ``lowest`` (0) to ``highest`` (1)."""
        share = self.highest if ease >= 1.0 else self.lowest + ease * (self.highest - self.lowest)
        rates = cost.rates(share)
        given = replace(self, granted=share, rates=rates)
        if given.settled:
            given = replace(given, granted=cost.budget(rates.decode, logits=1, depth=rates.depth))
        if share < self.highest:
            reason = Reason.LOAD
        elif given.settled:
            reason = Reason.FLOOR if rates.decode <= 0.0 else Reason.DEPTH
        else:
            reason = Reason.REQUESTED if share == self.requested else Reason.MAXIMUM
        return replace(given, reason=reason)


def grant(budget: ComputeBudget, cost: CostModel, maximum: float = 1.0) -> Grant:
    """The grant for a budget: the target, at most ``maximum``; the floor where that does not pay for adaptive firing.

    It is what a stage of the trunk costs at every byte where it pays for more than that, and not for placing the next.

    Raises:
        BudgetAboveMaximumError: the budget's minimum is above ``maximum``.
    """
    if budget.minimum > maximum:
        raise BudgetAboveMaximumError(f"at most {maximum:g} may be granted here, not {budget.minimum:g}")
    highest = min(budget.target, maximum)
    unset = Grant(budget.target, highest, Reason.REQUESTED, cost.rates(highest), highest, budget.minimum)
    return unset.at(1.0, cost)
