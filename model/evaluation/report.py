"""From scores by document to figures with intervals: the JSON of ``rheostat evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from model.evaluation.arms import Arm
from model.evaluation.bootstrap import NOTHING, Bootstrap, Estimate
from model.evaluation.experiment import Experiment
from model.evaluation.passages import FUTURE_CHARGE, Protocol
from model.evaluation.points import Point
from model.evaluation.scoring import ENDS, PLAIN, DocumentScores, Key
from model.ops.tiling import Floats, Integers

FULL: Key = (ENDS, "1")
FLOOR: Key = (ENDS, "0")

Json = dict[str, Any]
Statistic = Callable[[Floats], Floats]
"""A function of the bits per byte [R, K] of all columns, in R resamples, to one number [R] in each."""


def budget_rows(experiment: Experiment, scores: Sequence[DocumentScores]) -> list[Json]:
    """The shipped rule at each point, over documents of all domains."""
    arm = experiment.arms[0]
    total, full = sum(document.bytes for document in scores), sum(document.full_flops for document in scores)
    rows = []
    for point in experiment.points:
        tallies = [document.tallies[experiment.key(arm, point)] for document in scores]
        bits = sum(tally.bits for tally in tallies) / total + charge(experiment.protocol, arm, point)
        ratio = sum(tally.spent_flops for tally in tallies) / full
        rows.append({"budget": point.budget, "bits_per_byte": bits, "flop_ratio": ratio})
    return rows


def charge(protocol: Protocol, arm: Arm, point: Point) -> float:
    """Bits per byte that an arm owes for the future that its plans carry."""
    return FUTURE_CHARGE if protocol is Protocol.ORACLE and arm.looks_ahead and point.placed else 0.0


class DomainReport:
    """The figures of one domain, from the scores of its documents."""

    def __init__(self, experiment: Experiment, scores: Sequence[DocumentScores]) -> None:
        self._experiment = experiment
        self._scores = scores
        self._full_flops = sum(document.full_flops for document in scores)
        self._keys = list(scores[0].tallies)
        self._has_range = FULL in self._keys and FLOOR in self._keys
        sizes: Integers = np.array([document.bytes for document in scores], np.int64)
        bits = np.array([[document.tallies[key].bits for key in self._keys] for document in scores])
        self._bootstrap = Bootstrap(bits, sizes)

    def as_dict(self) -> Json:
        """All figures, ready for JSON."""
        arms = {arm.name: self._arm(arm) for arm in self._experiment.arms}
        extent = self._estimate(self._difference(FLOOR, FULL))
        return {
            "documents": len(self._scores),
            "bytes": sum(document.bytes for document in self._scores),
            "range": extent.as_dict(),
            "monotone": self._monotone(),
            "arms": arms,
            "plain": self._plain(),
            "frontier": self._frontier(arms[self._experiment.arms[0].name]),
            "per_document": self._per_document(),
        }

    def _bits(self, key: Key) -> Statistic:
        index = self._keys.index(key)
        return lambda columns: columns[:, index]

    def _difference(self, first: Key, second: Key, charge: float = 0.0) -> Statistic:
        """Bits of the first column, and a charge, less those of the second; nothing where one was not scored."""
        if first not in self._keys or second not in self._keys:
            return _nothing
        a, b = self._bits(first), self._bits(second)
        return lambda columns: a(columns) - b(columns) + charge

    def _share(self, difference: Statistic) -> Estimate:
        """A difference as a share of the range."""
        extent = self._difference(FLOOR, FULL)
        return self._estimate(lambda columns: difference(columns) / extent(columns))

    def _estimate(self, statistic: Statistic) -> Estimate:
        return self._bootstrap.estimate(statistic)

    def _spent(self, key: Key) -> int:
        return sum(document.tallies[key].spent_flops for document in self._scores)

    def _arm(self, arm: Arm) -> list[Json]:
        """The curve of an arm, as far as it was scored."""
        points = [point for point in self._experiment.points if self._experiment.key(arm, point) in self._keys]
        return [self._row(arm, point) for point in points]

    def _row(self, arm: Arm, point: Point) -> Json:
        """One point of a curve.

        ``above_full`` is what it lacks to full resolution, ``recovered`` the share of the range that it gives back,
        ``adaptive_gain`` how much more of it the shipped rule gives back; all with the charge, but for ``uncharged``.
        """
        experiment, shipped = self._experiment, self._experiment.arms[0]
        key, reference = experiment.key(arm, point), experiment.key(shipped, point)
        owed, owed_there = (charge(experiment.protocol, who, point) for who in (arm, shipped))
        bits = self._estimate(self._bits(key))
        tallies = [document.tallies[key] for document in self._scores]
        return {
            "label": point.label,
            "budget": point.budget,
            "bits_per_byte": bits.value + owed,
            "interval": bits.plus(owed).interval,
            "flop_ratio": self._spent(key) / self._full_flops,
            "flops_to_adaptive": self._spent(key) / self._spent(reference),
            "fire_rate": sum(tally.fires for tally in tallies) / sum(document.positions for document in self._scores),
            "above_full": self._estimate(self._difference(key, FULL, owed)).as_dict(),
            "recovered": self._share(self._difference(FLOOR, key, -owed)).as_dict(),
            "adaptive_gain": self._share(self._difference(key, reference, owed - owed_there)).as_dict(),
            "charge": owed,
            "uncharged": self._share(self._difference(FLOOR, key)).as_dict(),
        }

    def _monotone(self) -> Json:
        """The largest rise of the shipped rule's bits, without charge, from one point to the next dearer one."""
        arm = self._experiment.arms[0]
        keys = {self._experiment.key(arm, point) for point in self._experiment.points}
        rising = sorted(keys, key=self._spent)
        rises = [self._estimate(self._difference(dear, cheap)) for cheap, dear in pairwise(rising)]
        worst = max(rises, key=lambda rise: rise.value, default=NOTHING)
        noise = all(rise.interval is None or rise.low <= 0.0 for rise in rises)
        return {**worst.as_dict(), "within_noise": noise}

    def _plain(self) -> list[Json]:
        """Plain models by rising operations, as a share of the elastic model's at full resolution."""
        keys = sorted((key for key in self._keys if key[0] == PLAIN), key=self._spent)
        rows = []
        for key in keys:
            bits = self._estimate(self._bits(key))
            rows.append(
                {
                    "name": key[1],
                    "flop_ratio": self._spent(key) / self._full_flops,
                    "bits_per_byte": bits.value,
                    "interval": bits.interval,
                    "above_full": self._estimate(self._difference(key, FULL)).as_dict(),
                }
            )
        return rows

    def _frontier(self, adaptive: Sequence[Json]) -> list[Json]:
        """The elastic model against the line through the plain ones, at the operations of each of its points.

        ``gap`` is its bits less the line's: under 0 it is better. Beyond the cheapest and the dearest plain model the
        line goes on level, and ``beyond`` says so.
        """
        plain, rows = self._plain(), []
        if not plain:
            return []
        ratios = [float(row["flop_ratio"]) for row in plain]
        units = np.zeros((len(plain), len(self._keys)))
        for index, row in enumerate(plain):
            units[index, self._keys.index((PLAIN, row["name"]))] = 1.0
        for point, row in zip(self._experiment.points, adaptive, strict=True):
            at = row["flop_ratio"]
            weights = np.array([np.interp(at, ratios, unit) for unit in units.T])  # [K], of the line
            own = self._bits(self._experiment.key(self._experiment.arms[0], point))
            gap = self._estimate(_less_line(own, weights))
            rows.append(
                {
                    "label": point.label,
                    "flop_ratio": at,
                    "line": float(self._bootstrap.columns[0] @ weights),
                    "gap": gap.as_dict(),
                    "beyond": not ratios[0] <= at <= ratios[-1],
                }
            )
        return rows

    def _per_document(self) -> Json:
        """Bits (without charge), fires and operations of everything that was scored, in the order of documents."""
        return {
            "bytes": [document.bytes for document in self._scores],
            "full_flops": [document.full_flops for document in self._scores],
            "scores": {
                "/".join(key): {
                    name: [getattr(document.tallies[key], name) for document in self._scores]
                    for name in ("bits", "fires", "spent_flops")
                }
                for key in self._keys
            },
        }


def _less_line(bits: Statistic, weights: Floats) -> Statistic:
    return lambda columns: bits(columns) - columns @ weights


def _nothing(columns: Floats) -> Floats:
    return np.full(len(columns), np.nan)
