"""Which bytes end a tile, for a budget.

Source: section 4.3.1 of the source document (``TileManager``, ``Tile``, ``optimize_tiling``). Its table starts at
zero, so nothing can improve it; this one is an exact dynamic programme (``model/ops/tiling.py``), whose last tile may
be short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.adaptive.lagrange import PlannedBlock, Solver, spend_tiles
from model.config import ModelConfig
from model.ops.tiling import (
    Booleans,
    Bytes,
    Floats,
    Integers,
    fire_evenly,
    fire_online,
    fire_rows,
    plan_block,
    plan_sizes,
    staleness_table,
    tiling_loss,
)
from model.ops.views import Viewed
from model.state import RouterState

RATES: tuple[float, ...] = tuple(2.0 ** (-k / 2.0) for k in range(14, -1, -1))
"""Fire rates at which thresholds and prices are calibrated, 1/128 to 1."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A run of bytes that the trunk reads as one step: ``start`` up to, not including, ``end``."""

    start: int
    end: int
    info_loss: float
    """Bits lost at the tile's bytes before its last, where the trunk is stale, and by the gap that they are."""
    compute_cost: float
    """FLOPs of the trunk step."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Where a sequence stands before a block: its age, and its fires against their quota."""

    position: int
    last_fire: int
    """One more than the position of the last fire, 0 before the first."""
    fires: int
    quota: float


class TileManager(Viewed[tuple[Any, float, Floats]]):
    """Chooses tiles by exact dynamic programming over blocks, or causally byte by byte.

    Holds what both need: the staleness constant tau (fitted in training) and, per fire rate, the calibrated threshold
    (online rule) and price (dynamic programme), in logarithms of bits, and the spread of the density.
    """

    log_thresholds: Tensor
    log_prices: Tensor
    log_spread: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.min_tile_size = config.min_tile_size
        self.max_tile_size = config.max_tile_size
        self.block_size = config.block_size
        self.inertia = config.inertia
        self.restart_bytes = config.restart_bytes
        self.log_tau = nn.Parameter(torch.tensor(math.log(4.0)))
        start = torch.linspace(0.0, -4.0, len(RATES), dtype=torch.float64)
        self.register_buffer("log_thresholds", start.clone())
        self.register_buffer("log_prices", start.clone())
        self.register_buffer("log_spread", torch.zeros((), dtype=torch.float64))

    @property
    def tau(self) -> float:
        """Staleness constant in bytes."""
        return math.exp(self.log_tau.item())

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of the smoothed density over text."""
        return math.exp(self.log_spread.item())

    @torch.no_grad()
    def update_spread(self, density: Floats, momentum: float) -> None:
        """Move the spread towards that of smoothed densities [B, L], by ``momentum``."""
        self.log_spread.lerp_(
            torch.tensor(math.log(max(float(np.log(density).std()), 1e-6)), dtype=torch.float64).to(self.log_spread),
            momentum,
        )
        self._views = None

    @property
    def restart_loss(self) -> float:
        """Bits that a plan counts as lost where the trunk runs again after a gap."""
        return self.restart_bytes * math.exp(self.log_at(self.log_thresholds, 0.5))

    def staleness(self, age: Tensor) -> Tensor:
        """Share of a byte's density lost to a trunk that is ``age`` bytes old. Differentiable in tau."""
        return -torch.expm1(-age.to(self.log_tau.dtype) / self.log_tau.exp())

    def optimize_tiling(
        self,
        density: NDArray[np.floating],
        compute_budget: float,
        compute_cost: float,
        *,
        carry: int = 0,
        sizes: Sequence[int] | None = None,
    ) -> list[Tile]:
        """The tiling of one text that loses least for a budget, by a Lagrangian search over :meth:`cheapest_tiling`.

        It never costs more than the budget, and less only by under one tile or where the next better tiling on the
        convex hull of (compute, loss) costs too much.

        Args:
            density: [L] bits per byte. compute_budget: FLOPs. compute_cost: FLOPs of one trunk step.
            carry: age of the trunk before the first byte.
            sizes: bytes that a tile may have, rising; None for all from ``min_tile_size`` to ``max_tile_size``.

        Returns:
            Tiles in order; bytes after the last one belong to a tile that is still open.

        Raises:
            ValueError: the budget does not pay for the longest tiles, or ``sizes`` do not rise or leave the bounds.
        """
        values, table = self._prepare(density, carry)
        longest = self.max_tile_size if sizes is None else max(sizes, default=0)
        wanted = int(compute_budget / compute_cost * (1.0 + 1e-12))
        plan = spend_tiles(self._solver(values, table, carry, longest, sizes), wanted, _dearest(values))
        if plan.tiles > wanted:
            raise ValueError(
                f"compute_budget = {compute_budget} must be at least {plan.tiles * compute_cost} FLOPs for tiles of at "
                f"most {longest} bytes"
            )
        return self._tiles(plan.fires, values, table, carry, compute_cost)

    def cheapest_tiling(
        self,
        density: NDArray[np.floating],
        price: float,
        compute_cost: float,
        *,
        carry: int = 0,
        sizes: Sequence[int] | None = None,
    ) -> list[Tile]:
        """The tiling of one text at one price, lambda in bits per FLOP; otherwise as :meth:`optimize_tiling`."""
        values, table = self._prepare(density, carry)
        plan = self._solver(values, table, carry, self.max_tile_size, sizes)(price * compute_cost)
        return self._tiles(plan.fires, values, table, carry, compute_cost)

    def _prepare(self, density: NDArray[np.floating], carry: int) -> tuple[Floats, Floats]:
        values = np.ascontiguousarray(density, dtype=np.float64)
        return values, staleness_table(self.tau, carry + len(values) + 1)

    def _solver(
        self, density: Floats, table: Floats, carry: int, longest: int, sizes: Sequence[int] | None = None
    ) -> Solver:
        """The dynamic programme over one block, as a function of the price; ``sizes`` replace the interval."""
        allowed = None if sizes is None else np.array(sizes, np.int64)
        if allowed is not None and (
            not len(allowed)
            or (np.diff(allowed) <= 0).any()
            or not self.min_tile_size <= allowed[0] <= allowed[-1] <= self.max_tile_size
        ):
            raise ValueError(
                f"sizes = {sizes} must rise from {self.min_tile_size} or more to {self.max_tile_size} or less"
            )

        def solve(price: float) -> PlannedBlock:
            if allowed is None:
                plan = plan_block(density, table, price, self.restart_loss, carry, self.min_tile_size, longest)
            else:
                plan = plan_sizes(density, table, price, self.restart_loss, carry, allowed)
            fires, tiles, total = plan
            return PlannedBlock(fires, tiles, total - price * tiles)

        return solve

    def _tiles(self, fires: Bytes, density: Floats, table: Floats, carry: int, compute_cost: float) -> list[Tile]:
        ends = [int(end) for end in np.flatnonzero(fires) + 1]
        tiles = []
        for start, end in pairwise([0, *ends]):
            age = carry if start == 0 else 0
            loss = float(tiling_loss(fires[start:end], density[start:end], table, age))
            restart = self.restart_loss if age + end - start > 1 else 0.0
            tiles.append(Tile(start, end, loss + restart, compute_cost))
        return tiles

    def log_at(self, table: Tensor, rate: float) -> float:
        """The calibrated logarithm at ``rate``, linear in the logarithm of the rate between calibrated ones."""
        return float(np.interp(math.log(max(rate, RATES[0])), np.log(RATES), table.cpu().numpy()))

    def log_threshold(self, rates: Tensor) -> Tensor:
        """The calibrated log threshold [B] (float64) for rates [B]."""
        grid = (2.0 * torch.log2(rates.clamp(RATES[0], 1.0)) + len(RATES) - 1).clamp(0, len(RATES) - 1)
        low = grid.floor().long().clamp_max(len(RATES) - 2)
        part = grid - low
        return torch.lerp(self.log_thresholds[low], self.log_thresholds[low + 1], part)

    def fire_rows(self, density: Floats, rates: Floats, router: RouterState, rows: Integers) -> Booleans:
        """Which of the rows ``rows`` [n] of a batch on a CPU fire now [n]; the compiled twin of ``fire_step``.

        Args:
            density: [n] bits. rates: [B]. router: of the whole batch, not changed.
        """
        log_thresholds, spread, table = self.views()
        counts = (router.last_fire.numpy(), router.fires.numpy(), router.quota.numpy(), router.positions.numpy())
        fired: Booleans = fire_rows(
            rows, density, rates, log_thresholds, RATES[0], spread, self.inertia, table,
            *counts, self.min_tile_size, self.max_tile_size,
        )  # fmt: skip
        return fired

    def _make_views(self) -> tuple[Any, float, Floats]:
        return self.log_thresholds.numpy(), self.spread, staleness_table(self.tau, self.max_tile_size)

    def online(self, density: Floats, rate: float, pace: Pace, log_threshold: float | None = None) -> Bytes:
        """Fires [L] of the causal rule from ``pace`` on; the calibrated threshold unless one is given."""
        if log_threshold is None:
            log_threshold = self.log_at(self.log_thresholds, rate)
        table = staleness_table(self.tau, self.max_tile_size)
        return fire_online(
            density, table, rate, log_threshold, self.spread, self.inertia, pace.last_fire, pace.fires, pace.quota,
            pace.position, self.min_tile_size, self.max_tile_size,
        )  # fmt: skip

    def longest(self, rate: float) -> int:
        """Most bytes of a planned tile at ``rate``: ``max_tile_size``, or more where the rate could not be met."""
        return max(self.max_tile_size, math.ceil(2.0 / rate))

    def evenly(self, length: int, rate: float, pace: Pace) -> Bytes:
        """Fires [L] at a uniform stride, blind to the text: the baseline."""
        return fire_evenly(rate, pace.fires, pace.quota, length)

    def plan(self, density: Floats, rate: float, pace: Pace) -> Bytes:
        """Fires [L] of the dynamic programme over one block, held to the quota.

        The calibrated price is tried first; where it leaves the tolerated gap around the quota, the search for the
        number of tiles at the gap's nearer end begins at its plan.
        """
        length = len(density)
        if rate <= 0.0 or rate >= 1.0:
            return np.full(length, int(rate >= 1.0), np.uint8)
        carry = pace.position - pace.last_fire if pace.last_fire else self.max_tile_size
        solve = self._solver(density, staleness_table(self.tau, carry + length + 1), carry, self.longest(rate))
        target = pace.quota + rate * length - pace.fires
        slack = _slack(pace.position + length, rate)
        low, high = _bounds(target, slack, length)
        calibrated = solve(math.exp(self.log_at(self.log_prices, rate)))
        if low <= calibrated.tiles <= high:
            return calibrated.fires
        wanted = high if calibrated.tiles > high else low
        plan = spend_tiles(solve, wanted, _dearest(density), calibrated)
        if plan.tiles < low and self.min_tile_size == 1:
            return _prolong(plan.fires, density, low - plan.tiles)
        return plan.fires


def accrue(quota: Tensor, rate: float, length: int) -> Tensor:
    """The quota [1] (float64) after ``length`` more bytes at ``rate``, added byte by byte as a step does.

    To the last bit: at the pacing walls a difference in the last one would fire at other bytes, depending on how the
    text was cut into calls.
    """
    steps = np.full(length + 1, rate)
    steps[0] = quota.item()
    return torch.full_like(quota, np.add.accumulate(steps)[-1])


def _prolong(fires: Bytes, density: Floats, missing: int) -> Bytes:
    """Fires [L] with ``missing`` more, in the gap after the densest fire and, that filled, in those that follow.

    Plans made of long stretches lie far apart on the hull: none may have about the number of tiles that is due.
    """
    free = np.flatnonzero(fires == 0)
    densest = int(np.argmax(np.where(fires > 0, density, -1.0)))
    prolonged = fires.copy()
    prolonged[np.roll(free, -int(np.searchsorted(free, densest)))[:missing]] = 1
    return prolonged


def _dearest(density: Floats) -> float:
    """A price in bits per tile at which no tile is worth buying: more than all the bits there are."""
    return 2.0 * float(density.sum()) + 1.0


def _slack(position: int, rate: float) -> float:
    """Fires that a plan may be away from the quota: 12 or 10 % of those due, or 1 to 2 % of the bytes if more."""
    return max(min(12.0, 0.1 * rate * position), (0.008 + 0.01 * rate) * position * min(1.0, 4.0 * rate))


def _bounds(target: float, slack: float, length: int) -> tuple[int, int]:
    """The fewest and the most tiles of a block that leave the count within ``slack`` of ``target``."""
    low = min(max(math.ceil(target - slack), 0), length)
    high = min(max(math.floor(target + slack), low), length)
    return low, high
