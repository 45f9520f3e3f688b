"""Points of the dial at which arms are compared, and the rates at which arms spend the same there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from model.cost import CostModel, Rates
from model.evaluation.arms import Arm, Text, analysed, scaled
from model.evaluation.scoring import spent_flops
from model.ops.tiling import Floats

FLOOR = "floor"
TOLERANCE = 1e-3
"""Of the operations, within which arms are matched; no more than 1 % may be left."""
_TRIES = 12


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of the dial."""

    label: str
    budget: float | str
    """Share of full resolution, or ``FLOOR``."""
    rates: Rates
    """Trunk fires per byte that the shipped rule is given."""

    @property
    def end(self) -> int | None:
        """1 at full resolution, 0 where the trunk never runs, None between: only there arms differ."""
        rate = self.rates.decode
        if rate <= 0.0:
            return 0
        return 1 if rate >= 1.0 and self.rates.depth is None else None

    @property
    def placed(self) -> bool:
        """Whether some bytes fire and others do not: neither at the ends nor where a stage runs everywhere."""
        return 0.0 < self.rates.decode < 1.0


def make_points(cost: CostModel, budgets: Iterable[float | str], rates: Iterable[Fraction]) -> list[Point]:
    """Points by budget (a share of full resolution, or ``FLOOR``), and by the share of the trunk's blocks that run."""
    points = [
        Point(
            budget if isinstance(budget, str) else f"{budget:g}",
            budget,
            cost.rates(cost.floor if isinstance(budget, str) else budget),
        )
        for budget in budgets
    ]
    for rate in rates:
        depth, value = cost.at_share(rate)
        budget = cost.budget(value, logits=1, depth=depth)
        points.append(Point(f"rate {rate}", budget, Rates(value, value, depth)))
    return points


def match_rates(
    arm: Arm,
    reference: Arm,
    cost: CostModel,
    texts: Sequence[Text],
    signals: Sequence[Floats],
    point: Point,
    fires: int,
) -> Rates:
    """The rates at which an arm spends over texts what ``reference`` spends with ``fires`` trunk steps.

    Only counts of fires are looked at, never bits. Blind arms do not pay for the density and fire more often for it,
    unless the arm is compared at an equal number of fires.

    Args:
        signals: of ``arm``, one for each text.
    """
    positions = sum(len(text.passage) for text in texts)
    spared = (
        positions * cost.density(point.rates.depth)
        if analysed(reference, point.rates) and not analysed(arm, point.rates)
        else 0
    )
    fire = cost.fire(point.rates.depth)
    wanted = min(fires + (0.0 if arm.equal_rate else spared / fire), float(positions))
    paid = analysed(arm, point.rates)
    spent = sum(spent_flops(cost, text.passage, 0, point.rates.depth, analysed=paid) for text in texts)
    tolerance = TOLERANCE * (spent + wanted * fire) / fire
    factor, best, least = max(wanted, 1.0) / max(fires, 1), point.rates, math.inf
    low, high = 0.0, math.inf  # factors known to give too few fires, and too many
    for _ in range(_TRIES):
        rates = scaled(point.rates, factor)
        count = sum(
            int(arm.place(text.passage, signal, rates).sum()) for text, signal in zip(texts, signals, strict=True)
        )
        if abs(count - wanted) < least:
            best, least = rates, abs(count - wanted)
        if least <= tolerance or not count or rates.decode >= 1.0:
            break
        low, high = (factor, high) if count < wanted else (low, factor)
        factor *= wanted / count
        if not low < factor < high:
            factor = 0.5 * (low + min(high, 2.0 * low))
    return best
