"""Density, features and tiles of a text, block by block and at several rates, without running the trunk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from model.adaptive.tiling import Pace, TileManager, accrue
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Bytes, Floats, staleness_table
from model.state import ModelState


@dataclass(slots=True)
class TilingPlan:
    """One tiling in the making: the rule and the rate, and how far it has come."""

    rate: float
    """Trunk fires per byte, 0 to 1."""
    causal: bool
    """The online rule of generating and scoring, instead of the plan of a prompt's blocks."""
    pace: Pace = field(default_factory=lambda: Pace(position=0, last_fire=0, fires=0, quota=0.0))

    def advance(self, tiles: TileManager, density: Floats) -> tuple[Bytes, Floats]:
        """Fires [L] of the next block, and the bits [L] that its bytes lose to a stale trunk."""
        pace, length = self.pace, len(density)
        fires = (tiles.online if self.causal else tiles.plan)(density, self.rate, pace)
        position = np.arange(pace.position + 1, pace.position + length + 1)
        last = np.maximum.accumulate(np.where(fires, position, pace.last_fire))
        oldest = pace.position + length + tiles.max_tile_size
        # Before the first fire the trunk counts as stale as at the end of a full tile.
        age = np.where(last > 0, position - last, position + tiles.max_tile_size)
        self.pace = replace(
            pace,
            position=pace.position + length,
            last_fire=int(last[-1]),
            fires=pace.fires + int(fires.sum()),
            quota=accrue(torch.tensor([pace.quota], dtype=torch.float64), self.rate, length).item(),
        )
        return fires, density * staleness_table(tiles.tau, oldest)[age]


@dataclass(frozen=True, slots=True)
class PieceAnalysis:
    """What is known of L positions."""

    density: Floats
    """[L] bits, smoothed: what decides where the trunk runs."""
    features: Floats
    """[L, 5] in the order of ``model.adaptive.density.FEATURES``."""
    measured: bool
    """Whether the first four of them were measured; 0 otherwise."""
    fires: list[Bytes]
    """Per plan [L]."""
    losses: list[Floats]
    """Per plan [L] bits lost to a stale trunk; 0 where it fires."""


@torch.inference_mode()
def analyse_piece(
    model: AdaptiveAttentionSystem, tokens: Tensor, state: ModelState, plans: Iterable[TilingPlan]
) -> PieceAnalysis:
    """Analyse the next block of one text.

    Args:
        tokens: [1, L], at most ``block_size``; every block of a text but the last has exactly that length.
        state: before them; its encoder and density are replaced by those after. plans: advanced by L positions.
    """
    encoded = model.encode(tokens, state.encoder)
    state.encoder = encoded.states
    before = state.density
    features, state.density = model.features(encoded, before)
    density = model.density.smooth(model.density.combine(features), before, state.density)[0]
    tilings = [plan.advance(model.tiles, density) for plan in plans]
    return PieceAnalysis(
        density=density,
        features=features[0].double().cpu().numpy(),
        measured=model.density.measured,
        fires=[fires for fires, _ in tilings],
        losses=[lost for _, lost in tilings],
    )
