"""Density, features and tiles of a text, block by block and at several rates.

Of the trunk only the stages run that are below one that is placed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from model.adaptive.tiling import Pace, TileManager, accrue
from model.cost import Flops
from model.lm import AdaptiveAttentionSystem, Encoded, Entrance
from model.ops.tiling import Bytes, Floats, staleness_table
from model.state import DensityState, ModelState


@dataclass(slots=True)
class TilingPlan:
    """One tiling in the making: the rule and the rate, and how far it has come."""

    rate: float
    """Trunk fires per byte, 0 to 1."""
    causal: bool
    """The online rule of generating and scoring, instead of the plan of a prompt's blocks."""
    depth: int | None = None
    """Blocks of the trunk after which the stage ends that is placed; None for all."""
    pace: Pace = field(default_factory=lambda: Pace(position=0, last_fire=0, fires=0, quota=0.0))
    density: DensityState | None = None
    """Of its stage, where that is not the first; None at the start. Plans of one stage share it."""

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
    """[L] bits, smoothed, of the trunk's first stage: what decides where that runs."""
    features: Floats
    """[L, 5] in the order of ``model.adaptive.density.FEATURES``."""
    measured: bool
    """Whether the first four of them were measured; 0 otherwise."""
    fires: list[Bytes]
    """Per plan [L]."""
    losses: list[Floats]
    """Per plan [L] bits lost to a stale trunk; 0 where it fires."""


def analysis_flops(model: AdaptiveAttentionSystem, plans: Iterable[TilingPlan], positions: int) -> Flops:
    """Operations of :func:`analyse_piece`: encoder, the density of each stage placed, stages below the highest."""
    cost, depths = model.cost, model.config.depths
    placed = {0} | {_placed_stage(model, plan) for plan in plans}
    return Flops(
        encoder=positions * cost.unit.encoder,
        density=positions * sum(cost.density(depths[stage]) for stage in placed),
        trunk=positions * cost.below(depths[max(placed)]),
    )


def _placed_stage(model: AdaptiveAttentionSystem, plan: TilingPlan) -> int:
    """The stage of the trunk whose density a plan reads; the first where it reads none."""
    return model.config.stage(plan.depth) if model.cost.analysed(plan.rate) else 0


def _density(
    model: AdaptiveAttentionSystem, encoded: Encoded, entrance: Entrance, plans: Sequence[TilingPlan]
) -> Floats:
    """Smoothed density [L] of a later stage, whose state its plans carry."""
    analyzer, _ = model.placements()[entrance.stage]
    before = plans[0].density or analyzer.zero_state(1, model.device)
    features, after = model.features(encoded, before, entrance)
    density: Floats = analyzer.smooth(analyzer.combine(features), before, after)[0]
    for plan in plans:
        plan.density = after
    return density


@torch.inference_mode()
def analyse_piece(
    model: AdaptiveAttentionSystem, tokens: Tensor, state: ModelState, plans: Iterable[TilingPlan]
) -> PieceAnalysis:
    """Analyse the next block of one text.

    Args:
        tokens: [1, L], at most ``block_size``; every block of a text but the last has exactly that length.
        state: before them; its encoder, its density and the stages of its trunk that run below one that is placed are
            replaced by those after. plans: advanced by L positions.
    """
    plans = list(plans)
    encoded = model.encode(tokens, state.encoder)
    state.encoder = encoded.states
    before = state.density
    features, state.density = model.features(encoded, before)
    density = model.density.smooth(model.density.combine(features), before, state.density)[0]
    highest = max((_placed_stage(model, plan) for plan in plans), default=0)
    reading = replace(state, depth=torch.full_like(state.depth, model.config.depths[highest]))
    entrances = model.enter(encoded.hidden, reading)
    state.trunk = reading.trunk
    densities, tilings = {0: density}, []
    for stage in range(1, highest + 1):
        placing = [plan for plan in plans if _placed_stage(model, plan) == stage]
        if placing:
            densities[stage] = _density(model, encoded, entrances[stage], placing)
    for plan in plans:
        stage = _placed_stage(model, plan)
        tilings.append(plan.advance(model.placements()[stage][1], densities[stage]))
    return PieceAnalysis(
        density=density,
        features=features[0].double().cpu().numpy(),
        measured=model.density.measured,
        fires=[fires for fires, _ in tilings],
        losses=[lost for _, lost in tilings],
    )
