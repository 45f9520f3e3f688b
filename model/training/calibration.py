"""Calibration of a trained model on validation text.

The threshold and the price at which each fire rate is met, and the fires from which on a stage of the trunk is worth
placing.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.adaptive.tiling import RATES, TileManager
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Floats, plan_blocks, staleness_table
from model.training.firing import fit_log_threshold
from model.training.validation import analyse, bits_at


@torch.no_grad()
def calibrate(model: AdaptiveAttentionSystem, tokens: Tensor) -> None:
    """Fit the tables of log thresholds and log prices of each stage, and its least rate, to texts [B, L + 1], in place.

    The controller corrects what is left of thresholds and prices; good tables only mean that it has little to correct,
    so that fires fall where the text and not the quota wants them.
    """
    densities = [analyse(model, tokens[:, :-1], depth) for depth in model.config.depths]
    for depth, density in zip(model.config.depths, densities, strict=True):
        calibrate_tiles(model.placement(depth)[1], density)
    least_rates = []
    for (below, depth), density in zip(pairwise(model.config.depths), densities[1:], strict=True):
        alone = bits_at(model, tokens, np.empty(0), below, [1.0])
        least_rates.append(find_least_rate(alone - bits_at(model, tokens, density, depth, RATES)))
    model.set_least_rates(least_rates)


def find_least_rate(gains: Floats) -> float:
    """The lowest of ``RATES`` from which on a stage is worth placing.

    Args:
        gains: [R, B] bits per byte of B texts that it saves at each rate, over the stages below left alone. They count
            where their mean is above zero by two standard errors.

    Returns:
        1 where nothing else counts: with all of its fires, a stage is never withheld.
    """
    errors = gains.std(axis=1, ddof=1) / math.sqrt(gains.shape[1]) if gains.shape[1] > 1 else 0.0
    pays = gains.mean(axis=1) > 2.0 * errors
    unsure = np.flatnonzero(~pays[:-1])
    return RATES[int(unsure[-1]) + 1] if len(unsure) else RATES[0]


@torch.no_grad()
def calibrate_tiles(tiles: TileManager, densities: Floats) -> None:
    """Fit the tables and the spread of a tile manager to smoothed densities [B, L] of texts, in place."""
    tiles.update_spread(densities, 1.0)
    # Every threshold is low enough for rate 1, and interpolation towards one of them would miss the rates below.
    rates = [min(rate, 0.98) for rate in RATES]
    _fill(tiles.log_thresholds, [fit_log_threshold(tiles, list(densities), rate) for rate in rates])
    _fill(tiles.log_prices, [fit_log_price(tiles, densities, rate) for rate in rates])


def _fill(table: Tensor, values: list[float]) -> None:
    """Write fitted values into a table; a lower rate never has a lower one, so a running maximum removes the noise."""
    monotone = np.maximum.accumulate(np.array(values)[::-1])[::-1]
    table.copy_(torch.from_numpy(monotone.copy()))


def fit_log_price(tiles: TileManager, densities: Floats, rate: float) -> float:
    """The log price at which the block-wise dynamic programme, left alone, fires at ``rate`` over texts [B, L]."""
    low, high = -14.0, 6.0
    wanted = rate * densities.size
    for _ in range(14):
        middle = 0.5 * (low + high)
        fires = _planned(tiles, densities, rate, math.exp(middle))
        low, high = (middle, high) if fires > wanted else (low, middle)
    return 0.5 * (low + high)


def _planned(tiles: TileManager, densities: Floats, rate: float, price: float) -> int:
    """Tiles of texts [B, L], planned block by block at one price."""
    longest = tiles.longest(rate)
    batch, length = densities.shape
    table = staleness_table(tiles.tau, length + longest + 1)
    prices, carries = np.full(batch, price), np.full(batch, longest)
    count = 0
    for start in range(0, length, tiles.block_size):
        block = np.ascontiguousarray(densities[:, start : start + tiles.block_size])
        fires, fired, _ = plan_blocks(block, table, prices, tiles.restart_loss, carries, tiles.min_tile_size, longest)
        since = np.argmax(fires[:, ::-1], axis=1)  # bytes after the last fire
        carries = np.where(fired > 0, since, carries + block.shape[1])
        count += int(fired.sum())
    return count
