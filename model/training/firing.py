"""Which bytes fire in the reduced pass of a training step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.adaptive.tiling import Pace, TileManager
from model.config import ModelConfig
from model.ops.tiling import Booleans, Floats
from model.training.config import TrainingConfig

START = Pace(position=0, last_fire=0, fires=0, quota=0.0)


@dataclass(frozen=True, slots=True)
class Reduced:
    """The resolution of one reduced pass."""

    rate: float
    uniform: bool
    d_state: int | None
    momentum: float
    """Of the running statistics of the density features."""
    ends_only: bool = False
    """Whether nothing but full resolution, smaller depths and the floor is trained: no early exit, no density."""
    depth: int | None = None
    """Blocks after which the stage ends that is placed, those below it at every byte; None for all."""


def sample_reduced(config: TrainingConfig, shape: ModelConfig, step: int) -> Reduced:
    """The resolution of step ``step``; the same for the same seed. One for the batch, so that tiles pack evenly."""
    if step < config.first_reduced:
        return Reduced(0.0, uniform=False, d_state=None, momentum=0.0, ends_only=True)
    random = np.random.default_rng([config.seed, step, 1])
    floor, uniform, leveled, where = random.random(4)
    lower = shape.d_state_levels[:-1]
    d_state = None
    if leveled < config.level_share and lower:
        d_state = int(random.choice(lower))
    low, high = config.lowest_rate, config.highest_rate
    rate = 0.0 if floor < config.floor_share else low + where * (high - low)
    depth = None
    if shape.shallow_depths and random.random() < config.shallow_share:
        blocks = np.diff(shape.shallow_depths, prepend=0)
        depth = int(random.choice(shape.shallow_depths, p=blocks / blocks.sum()))
    momentum = max(0.02, 1.0 / (step - config.first_reduced + 1))
    return Reduced(rate, uniform < config.uniform_share, d_state, momentum, depth=depth)


def fit_log_threshold(tiles: TileManager, densities: list[Floats], rate: float) -> float:
    """The log threshold at which the online rule, left alone, fires at ``rate`` over these texts, by bisection.

    "Left alone": started at its quota and paced loosely, so that the threshold and not the controller sets the count.
    """
    low, high = -14.0, 4.0
    wanted = rate * sum(len(density) for density in densities)
    for _ in range(14):
        middle = 0.5 * (low + high)
        fires = sum(int(tiles.online(density, rate, START, middle).sum()) for density in densities)
        low, high = (middle, high) if fires > wanted else (low, middle)
    return 0.5 * (low + high)


def choose_fires(tiles: TileManager, density: Floats, reduced: Reduced) -> Booleans:
    """Fires [B, L] for smoothed density [B, L]: never, at a uniform stride, or by the causal rule."""
    if reduced.rate <= 0.0:
        return np.zeros(density.shape, np.bool_)
    rows = list(density)
    if reduced.uniform:
        chosen = [tiles.evenly(len(row), reduced.rate, START) for row in rows]
    else:
        log_threshold = fit_log_threshold(tiles, rows, reduced.rate)
        chosen = [tiles.online(row, reduced.rate, START, log_threshold) for row in rows]
    return np.stack(chosen).astype(np.bool_)
