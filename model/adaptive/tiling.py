"""Which bytes end a tile, for a budget.

Source: section 4.3.1 of the source document (``TileManager``, ``Tile``, ``optimize_tiling``). Its table starts at
zero, so nothing can improve it; this one is an exact dynamic programme (``model/ops/tiling.py``), whose last tile may
be short.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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
    staleness_table,
    tiling_loss,
)
from model.state import RouterState

Plan = tuple[float, Bytes, int]
"""Logarithm of the price, fires, number of tiles."""

ENTRY_TILES = 2.0
"""What a plan pays to begin a stretch of fires after a gap, in prices of a tile."""
RATES = tuple(2.0 ** (-k / 2.0) for k in range(14, -1, -1))
"""Fire rates at which thresholds and prices are calibrated, 1/128 to 1."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A run of bytes that the trunk reads as one step: ``start`` up to, not including, ``end``."""

    start: int
    end: int
    info_loss: float
    """Bits lost at the tile's bytes before its last, where the trunk is stale."""
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


class TileManager(nn.Module):
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

    def staleness(self, age: Tensor) -> Tensor:
        """Share of a byte's density lost to a trunk that is ``age`` bytes old. Differentiable in tau."""
        return -torch.expm1(-age.to(self.log_tau.dtype) / self.log_tau.exp())

    def optimize_tiling(
        self, density: NDArray[np.floating], price: float, compute_cost: float, *, carry: int = 0
    ) -> list[Tile]:
        """The cheapest tiling of one text at one price.

        Args:
            density: [L] bits per byte. price: lambda in bits per FLOP. compute_cost: FLOPs of one trunk step.
            carry: age of the trunk before the first byte.

        Returns:
            Tiles in order; bytes after the last one belong to a tile that is still open.
        """
        values = np.ascontiguousarray(density, dtype=np.float64)
        table = staleness_table(self.tau, carry + len(values) + 1)
        bits = price * compute_cost
        fires, _, _ = plan_block(values, table, bits, ENTRY_TILES * bits, carry, self.min_tile_size, self.max_tile_size)
        tiles, start = [], 0
        for end in np.flatnonzero(fires) + 1:
            inside = np.zeros(end - start, np.uint8)
            inside[-1] = 1
            loss = tiling_loss(inside, values[start:end], table, carry if start == 0 else 0)
            tiles.append(Tile(start, int(end), float(loss), compute_cost))
            start = int(end)
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
        table = staleness_table(self.tau, self.max_tile_size)
        counts = (router.last_fire.numpy(), router.fires.numpy(), router.quota.numpy(), router.positions.numpy())
        fired: Booleans = fire_rows(
            rows, density, rates, self.log_thresholds.numpy(), RATES[0], self.spread, table, *counts,
            self.min_tile_size, self.max_tile_size,
        )  # fmt: skip
        return fired

    def online(self, density: Floats, rate: float, pace: Pace, log_threshold: float | None = None) -> Bytes:
        """Fires [L] of the causal rule from ``pace`` on; the calibrated threshold unless one is given."""
        if log_threshold is None:
            log_threshold = self.log_at(self.log_thresholds, rate)
        table = staleness_table(self.tau, self.max_tile_size)
        return fire_online(
            density, table, rate, log_threshold, self.spread, pace.last_fire, pace.fires, pace.quota, pace.position,
            self.min_tile_size, self.max_tile_size,
        )  # fmt: skip

    def longest(self, rate: float) -> int:
        """Most bytes of a planned tile at ``rate``: ``max_tile_size``, or more where the rate could not be met."""
        return max(self.max_tile_size, math.ceil(2.0 / rate))

    def evenly(self, length: int, rate: float, pace: Pace) -> Bytes:
        """Fires [L] at a uniform stride, blind to the text: the baseline."""
        return fire_evenly(rate, pace.fires, pace.quota, length)

    def plan(self, density: Floats, rate: float, pace: Pace) -> Bytes:
        """Fires [L] of the dynamic programme over one block, held to the quota.

        The calibrated price is tried first; where it leaves the tolerated gap around the quota, bisection on the price
        finds the two neighbouring plans, and the block follows the one, then the other, so that the count is met.
        """
        length = len(density)
        if rate <= 0.0 or rate >= 1.0:
            return np.full(length, int(rate >= 1.0), np.uint8)
        carry = pace.position - pace.last_fire if pace.last_fire else self.max_tile_size
        table = staleness_table(self.tau, carry + length + 1)
        longest = self.longest(rate)

        def solve(log_price: float) -> tuple[Bytes, int]:
            price = math.exp(log_price)
            fires, tiles, _ = plan_block(density, table, price, ENTRY_TILES * price, carry, self.min_tile_size, longest)
            return fires, tiles

        target = pace.quota + rate * length - pace.fires
        slack = _slack(pace.position + length, rate)
        low, high = _bounds(target, slack, length)
        log_price = self.log_at(self.log_prices, rate)
        fires, tiles = solve(log_price)
        if low <= tiles <= high:
            return fires
        wanted = high if tiles > high else low
        return _bisect(solve, (log_price, fires, tiles), wanted)


def _slack(position: int, rate: float) -> float:
    """Fires that a plan may be away from the quota: 12 or 10 % of those due, or 1 to 3 % of the bytes if more."""
    return max(min(12.0, 0.1 * rate * position), (0.008 + 0.02 * rate) * position * min(1.0, 4.0 * rate))


def _bounds(target: float, slack: float, length: int) -> tuple[int, int]:
    """The fewest and the most tiles of a block that leave the count within ``slack`` of ``target``."""
    low = min(max(math.ceil(target - slack), 0), length)
    high = min(max(math.floor(target + slack), low), length)
    return low, high


def _bisect(solve: Callable[[float], tuple[Bytes, int]], start: Plan, wanted: int) -> Bytes:
    """A plan with about ``wanted`` tiles: bracket it between two prices, narrow, and mix the two plans left."""
    log_price, fires, tiles = start
    direction = 1.0 if tiles > wanted else -1.0  # a higher price buys fewer tiles
    many = few = fires
    near, step = log_price, 1.0
    far = near
    for _ in range(10):  # reaches e^100 times the first price: every density there is
        far = near + direction * step
        fires, tiles = solve(far)
        if tiles > wanted:
            many = fires
        else:
            few = fires
        if (tiles - wanted) * direction <= 0:
            break
        near, step = far, step * 1.5
    low, high = min(near, far), max(near, far)
    for _ in range(16):
        if tiles == wanted:
            return fires
        middle = 0.5 * (low + high)
        fires, tiles = solve(middle)
        if tiles > wanted:
            low, many = middle, fires
        else:
            high, few = middle, fires
    return _mix(many, few, wanted)


def _mix(many: Bytes, few: Bytes, wanted: int) -> Bytes:
    """The plan with more tiles up to some byte, the other from there on, with about ``wanted`` tiles."""
    before = np.concatenate([[0], np.cumsum(many, dtype=np.int64)])
    after = np.concatenate([np.cumsum(few[::-1], dtype=np.int64)[::-1], [0]])
    cut = int(np.argmin(np.abs(before + after - wanted)))
    return np.concatenate([many[:cut], few[cut:]])
