"""Calibration of a trained model: the threshold and the price at which each fire rate is met on validation text."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from model.adaptive.tiling import ENTRY_TILES, RATES, TileManager
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Floats, plan_block, staleness_table
from model.training.firing import fit_log_threshold


@torch.no_grad()
def calibrate(model: AdaptiveAttentionSystem, tokens: Tensor) -> None:
    """Fit the model's tables of log thresholds and log prices to texts [B, L], in place.

    The controller corrects what is left; a good table only means that it has little to correct, so that fires fall
    where the text and not the quota wants them.
    """
    density = model.analyse(tokens).numpy()
    densities = list(density)
    tiles = model.tiles
    tiles.update_spread(density, 1.0)
    # Every threshold is low enough for rate 1, and interpolation towards one of them would miss the rates below.
    rates = [min(rate, 0.98) for rate in RATES]
    thresholds = [fit_log_threshold(tiles, densities, rate) for rate in rates]
    prices = [fit_log_price(tiles, densities, rate) for rate in rates]
    for table, values in ((tiles.log_thresholds, thresholds), (tiles.log_prices, prices)):
        # A lower rate never has a lower threshold; the running maximum removes the noise of neighbouring fits.
        monotone = np.maximum.accumulate(np.array(values)[::-1])[::-1]
        table.copy_(torch.from_numpy(monotone.copy()))


def fit_log_price(tiles: TileManager, densities: list[Floats], rate: float) -> float:
    """The log price at which the block-wise dynamic programme, left alone, fires at ``rate``, by bisection."""
    low, high = -14.0, 6.0
    wanted = rate * sum(len(density) for density in densities)
    for _ in range(14):
        middle = 0.5 * (low + high)
        fires = sum(_planned(tiles, density, rate, math.exp(middle)) for density in densities)
        low, high = (middle, high) if fires > wanted else (low, middle)
    return 0.5 * (low + high)


def _planned(tiles: TileManager, density: Floats, rate: float, price: float) -> int:
    """Tiles of one text, planned block by block at one price."""
    longest = tiles.longest(rate)
    table = staleness_table(tiles.tau, len(density) + longest + 1)
    count, carry = 0, longest
    for start in range(0, len(density), tiles.block_size):
        block = density[start : start + tiles.block_size]
        fires, fired, _ = plan_block(block, table, price, ENTRY_TILES * price, carry, tiles.min_tile_size, longest)
        at = np.flatnonzero(fires)
        carry = len(block) - 1 - int(at[-1]) if len(at) else carry + len(block)
        count += fired
    return count
