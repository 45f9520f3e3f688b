"""Arms: ways to choose where the trunk runs, at equal compute, on one checkpoint.

An arm is a tile manager, which turns a signal (one value per byte, mostly the density) into places, and the signal that
it is given. The shipped rule is the arm ``adaptive``; the others are falsifiers: whatever they reach too, the shipped
rule cannot claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numba import njit
from torch import Tensor

from model.adaptive.density import FEATURES, InformationDensityAnalyzer
from model.adaptive.tiling import Pace, TileManager
from model.cost import CostModel, Rates
from model.evaluation.passages import Calibration, Passage, Protocol, read_features
from model.evaluation.tilings import TilingPlan
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import FARTHEST, Booleans, Bytes, Floats, pacing_error
from model.training.calibration import calibrate_tiles

STRETCH = 64
"""Bytes of a blind stretch."""

SEED = 20_260
"""Of what is shuffled."""

_SILENT = 1e-5
"""Deviation of a log density that is rounding."""

ADAPTIVE = "adaptive"
BLIND = ("uniform", "uniform-rate", "stretches", "whitespace")
SHUFFLED = ("shuffled", "shuffled-runs")
ONLY = tuple(f"only-{feature}" for feature in FEATURES)
WITHOUT = tuple(f"without-{feature}" for feature in FEATURES)
STRICT_ARMS = (ADAPTIVE, "threshold", *BLIND, *SHUFFLED, *ONLY, *WITHOUT)
PLANNED_ARMS = (ADAPTIVE, "online", "threshold", "uniform")
REFITTED = ("threshold", "whitespace", *ONLY, *WITHOUT)
"""Arms whose thresholds are fitted to calibration text."""


class UniformTiles(TileManager):
    """A uniform stride, blind to the text."""

    def online(self, density: Floats, rate: float, pace: Pace, log_threshold: float | None = None) -> Bytes:  # noqa: ARG002
        """Fires [L] wherever the quota allows one more."""
        return self.evenly(len(density), rate, pace)

    def plan(self, density: Floats, rate: float, pace: Pace) -> Bytes:
        """The same."""
        return self.evenly(len(density), rate, pace)


class StretchTiles(TileManager):
    """Stretches of ``STRETCH`` fires with equal gaps between them, blind to the text; the signal is the position."""

    def online(self, density: Floats, rate: float, pace: Pace, log_threshold: float | None = None) -> Bytes:  # noqa: ARG002
        """Fires [L] where the position in its period of ``STRETCH / rate`` is in the first ``STRETCH`` bytes."""
        return (np.mod(density * rate / STRETCH, 1.0) < rate).astype(np.uint8)

    def plan(self, density: Floats, rate: float, pace: Pace) -> Bytes:
        """The same."""
        return self.online(density, rate, pace)


class ThresholdTiles(TileManager):
    """One threshold on the signal: no staleness, no inertia, no longest tile; paced as the shipped rule is."""

    def online(self, density: Floats, rate: float, pace: Pace, log_threshold: float | None = None) -> Bytes:
        """Fires [L] where the signal reaches the threshold, bent by the pacing error."""
        if rate >= 1.0:
            return np.ones(len(density), np.uint8)
        if log_threshold is None:
            log_threshold = self.log_at(self.log_thresholds, rate)
        return _fire_threshold(
            np.log(density), rate, log_threshold, self.spread, float(pace.fires), pace.quota, pace.position
        )

    def plan(self, density: Floats, rate: float, pace: Pace) -> Bytes:
        """Fires [L] at the largest values of the block, as many as are due."""
        due = round(pace.quota + rate * len(density) - pace.fires)
        fires = np.zeros(len(density), np.uint8)
        fires[np.argsort(-density, kind="stable")[: max(due, 0)]] = 1
        return fires


class OnlineTiles(TileManager):
    """The shipped causal rule where blocks are planned, too."""

    def plan(self, density: Floats, rate: float, pace: Pace) -> Bytes:
        """Fires [L] of the causal rule."""
        return self.online(density, rate, pace)


# Not cached on disk: the cache would not notice a change of the pacing error, which stands in another file.
@njit(cache=False)
def _fire_threshold(
    log_signal: Floats, rate: float, log_threshold: float, spread: float, fires: float, quota: float, position: int
) -> Bytes:  # pragma: no cover - compiled
    out = np.zeros(log_signal.shape[0], np.uint8)
    for t in range(log_signal.shape[0]):
        quota += rate
        error = pacing_error(fires, quota, float(position + t + 1), rate)
        if abs(error) >= FARTHEST:
            fired = error < 0.0
        else:
            fired = log_signal[t] >= log_threshold + spread * (error + 4.0 * error**3)
        if fired:
            out[t] = 1
            fires += 1.0
    return out


@dataclass(frozen=True, slots=True)
class Text:
    """A passage and its density features [L, F], of the stage of the trunk that is placed."""

    passage: Passage
    features: Tensor


Signal = Callable[[Text], Floats]
Combination = Callable[[Tensor], Tensor]
"""Density [...] from raw features [..., F], before it is smoothed."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to choose places."""

    name: str
    tiles: TileManager
    signal: Signal
    """One value [L] per byte, above 0 where a threshold is set on it."""
    pays: bool
    """Whether the density is among what it spends."""
    looks_ahead: bool
    """Whether its plan of a block depends on bytes to come."""
    equal_rate: bool = False
    """Compared at as many fires, not at as many operations."""
    shuffle: Callable[[Bytes, np.random.Generator], Bytes] | None = None
    """What is done to the places at last."""

    def place(self, passage: Passage, signal: Floats, rates: Rates) -> Bytes:
        """Fires [L] of a passage with this arm's ``signal`` [L]: planned in blocks, then causally, as it is served."""
        block = self.tiles.block_size
        plan = TilingPlan(rates.prefill, causal=False)
        parts = [
            plan.advance(self.tiles, signal[start : min(start + block, passage.planned)])[0]
            for start in range(0, passage.planned, block)
        ]
        if passage.planned < len(passage):
            plan.rate, plan.causal = rates.decode, True
            parts.append(plan.advance(self.tiles, signal[passage.planned :])[0])
        fires = np.concatenate(parts)
        if self.shuffle is None:
            return fires
        return self.shuffle(fires, np.random.default_rng([SEED, passage.order]))


def make_arms(
    model: AdaptiveAttentionSystem,
    names: Iterable[str],
    protocol: Protocol,
    calibration: Calibration | None,
    depth: int | None = None,
) -> list[Arm]:
    """The named arms. Those of ``REFITTED`` are fitted to calibration texts, as training fits the shipped one.

    They place the stage of the trunk that ends after ``depth`` blocks; None for the last.

    Raises:
        ValueError: a name is not an arm of the protocol, or calibration text is missing.
    """
    known = STRICT_ARMS if protocol is Protocol.STRICT else PLANNED_ARMS
    names = list(names)
    for name in names:
        if name not in known:
            raise ValueError(f"arm {name!r} of protocol {protocol} must be one of {', '.join(known)}")
    refitted = [name for name in names if name in REFITTED]
    if refitted and calibration is None:
        raise ValueError(f"the arms {', '.join(refitted)} need calibration text to fit their thresholds")
    factory = _Factory(model, calibration, depth)
    return [factory.make(name) for name in names]


class _Factory:
    def __init__(self, model: AdaptiveAttentionSystem, calibration: Calibration | None, depth: int | None) -> None:
        self._config = model.config
        self._analyzer, self._shipped = model.placement(depth)
        self._calibration = calibration
        self._features = None
        if calibration is not None:
            self._features = read_features(model, calibration.tokens.to(model.device), depth)

    def make(self, name: str) -> Arm:
        combine = self._analyzer.combine
        density = self._density(combine)
        if name == ADAPTIVE:
            return Arm(name, self._shipped, density, pays=True, looks_ahead=True)
        if name == "online":
            return Arm(name, self._tiles(OnlineTiles), density, pays=True, looks_ahead=False)
        if name == "threshold":
            tiles = self._fitted(ThresholdTiles, self._smoothed(combine))
            return Arm(name, tiles, density, pays=True, looks_ahead=True)
        if name == "whitespace":
            assert self._calibration is not None
            tiles = self._fitted(ThresholdTiles, np.stack([nearness(row) for row in self._calibration.spaces]))
            return Arm(name, tiles, lambda text: nearness(text.passage.spaces), pays=False, looks_ahead=True)
        if name == "stretches":
            return Arm(name, self._tiles(StretchTiles), _positions, pays=False, looks_ahead=False)
        if name in BLIND:
            tiles = self._tiles(UniformTiles)
            return Arm(name, tiles, _positions, pays=False, looks_ahead=False, equal_rate=name == "uniform-rate")
        if name in SHUFFLED:
            shuffle = shuffle_tiles if name == "shuffled" else shuffle_runs
            return Arm(name, self._shipped, density, pays=True, looks_ahead=True, shuffle=shuffle)
        kind, _, feature = name.partition("-")
        kept = [(other == feature) == (kind == "only") for other in FEATURES]
        assert self._features is not None
        restricted = restrict(self._analyzer, kept, self._features)
        tiles = self._fitted(TileManager, self._smoothed(restricted))
        return Arm(name, tiles, self._density(restricted), pays=True, looks_ahead=True)

    def _tiles(self, kind: type[TileManager]) -> TileManager:
        tiles = kind(self._config)
        tiles.load_state_dict(self._shipped.state_dict())
        return tiles.requires_grad_(False)

    def _fitted(self, kind: type[TileManager], signals: Floats) -> TileManager:
        tiles = self._tiles(kind)
        calibrate_tiles(tiles, signals)
        return tiles

    def _smoothed(self, combine: Combination) -> Floats:
        assert self._features is not None
        return smooth_features(self._analyzer, self._features, combine)

    def _density(self, combine: Combination) -> Signal:
        return lambda text: smooth_features(self._analyzer, text.features.unsqueeze(0), combine)[0]


@torch.inference_mode()
def smooth_features(analyzer: InformationDensityAnalyzer, features: Tensor, combine: Combination) -> Floats:
    """The density [B, L] by which places are chosen, from raw features [B, L, F] of sequences from their start."""
    device = analyzer.mean.device
    before, after = (analyzer.zero_state(len(features), device) for _ in range(2))
    return analyzer.smooth(combine(features.to(device)), before, after)


@torch.no_grad()
def restrict(analyzer: InformationDensityAnalyzer, kept: Sequence[bool], features: Tensor) -> Combination:
    """The analyzer's density as if only some features told something: the others stay at their mean.

    The logarithm of the density is scaled and moved to have the mean and the deviation over ``features`` [..., F] that
    it has with all of them: otherwise a feature of small weight would be judged by staleness alone. So is one of no
    weight at all, whose density does not change.
    """
    device = analyzer.mean.device
    mask, average = torch.tensor(kept, device=device), features.to(device).flatten(0, -2).mean(0)

    def part(values: Tensor) -> Tensor:
        return analyzer.combine(torch.where(mask, values, average)).log()

    whole, rest = analyzer.combine(features.to(device)).log(), part(features.to(device))
    gain = whole.std() / rest.std() if rest.std() > _SILENT else 1.0
    return lambda values: (gain * (part(values) - rest.mean()) + whole.mean()).exp()


def nearness(spaces: Booleans) -> Floats:
    """A signal [L] that falls with the distance to the last whitespace, itself included, from 1."""
    index = np.arange(len(spaces))
    last = np.maximum.accumulate(np.where(spaces, index, -1))
    return 1.0 / (1.0 + (index - last).astype(np.float64))


def _positions(text: Text) -> Floats:
    return text.passage.offset + np.arange(len(text.passage), dtype=np.float64)


def shuffle_tiles(fires: Bytes, random: np.random.Generator) -> Bytes:
    """The tiles of fires [L] in random order; bytes after the last fire stay where they are."""
    ends = np.flatnonzero(fires) + 1
    shuffled = np.zeros_like(fires)
    shuffled[np.cumsum(random.permutation(np.diff(ends, prepend=0))) - 1] = 1
    return shuffled


def shuffle_runs(fires: Bytes, random: np.random.Generator) -> Bytes:
    """The runs of consecutive fires, and of bytes between them, of [L] each in random order."""
    bounds = np.flatnonzero(np.diff(fires)) + 1
    runs = np.split(fires, bounds)
    shuffled: list[Bytes | None] = [None] * len(runs)
    for first in (0, 1):
        places = np.arange(first, len(runs), 2)
        for place, source in zip(places, random.permutation(places), strict=True):
            shuffled[place] = runs[source]
    return np.concatenate([run for run in shuffled if run is not None])


def scaled(rates: Rates, factor: float) -> Rates:
    """Rates multiplied by a factor, kept between 0 and 1."""
    return replace(rates, prefill=min(rates.prefill * factor, 1.0), decode=min(rates.decode * factor, 1.0))


def analysed(arm: Arm, rates: Rates) -> bool:
    """Whether the arm pays for the density at these rates."""
    return arm.pays and CostModel.analysed(rates.decode)
