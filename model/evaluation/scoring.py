"""Bits that a model needs for a passage, under given places of its trunk, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from model.cost import CostModel
from model.evaluation.passages import Passage, piece_length
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Bytes, Floats

PLAIN = "plain"
"""First part of the key of a plain model's tallies; arms' keys begin with their name."""
ENDS = "ends"
"""First part of the key of what all arms share: full resolution, and the floor."""

Key = tuple[str, str]


@dataclass(slots=True)
class Tally:
    """What one way of reading a text gave and cost; grows passage by passage."""

    bits: float = 0.0
    fires: int = 0
    spent_flops: int = 0

    def add(
        self, cost: CostModel, passage: Passage, fires: Bytes, bits: float, depth: int | None = None, *, analysed: bool
    ) -> None:
        """Count a passage placed by ``fires`` [L] of ``depth`` blocks (None: all), its density computed or not."""
        fired = int(fires.sum())
        self.bits += bits
        self.fires += fired
        self.spent_flops += spent_flops(cost, passage, fired, depth, analysed=analysed)


@dataclass(slots=True)
class DocumentScores:
    """What every arm and plain model made of one document."""

    bytes: int = 0
    """Scored."""
    positions: int = 0
    """Read."""
    full_flops: int = 0
    tallies: dict[Key, Tally] = field(default_factory=dict)


def spent_flops(cost: CostModel, passage: Passage, fired: int, depth: int | None = None, *, analysed: bool) -> int:
    """Operations of reading a passage with ``fired`` trunk steps and predicting its scored tokens."""
    length = len(passage)
    propagated = length - fired if fired else None  # also for those that do not pay for the density
    read = length if analysed else 0
    return cost.flops(length, fired, passage.logits, read, propagated=propagated, depth=depth).total


def full_flops(cost: CostModel, passage: Passage) -> int:
    """The same at full resolution."""
    return cost.full_flops(len(passage), passage.logits)


@torch.inference_mode()
def score(
    model: AdaptiveAttentionSystem,
    passage: Passage,
    placements: Sequence[Bytes],
    depths: Sequence[int | None],
    progress: Callable[[int], object] = lambda _: None,
) -> Floats:
    """Bits [n] of the scored tokens of a passage under n placements, each fires [L]; the encoder runs once for all.

    ``depths`` are the blocks after which the trunk's placed stage ends at each, None for all.
    ``progress`` is called with the scored bytes of each piece read.
    """
    piece = piece_length(model)
    encoder = model.allocate_state(1).encoder
    states = [model.allocate_state(1, depth=depth) for depth in depths]
    below = {depth: model.allocate_state(1, depth=depth) for depth in depths}  # what runs everywhere is read once
    everywhere = [bool(fires.all()) for fires in placements]
    somewhere = [bool(fires.any()) for fires in placements]
    nats = np.zeros(len(placements))
    for start in range(0, len(passage), piece):
        end = min(start + piece, len(passage))
        encoded = model.encode(passage.inputs[:, start:end], encoder)
        encoder = encoded.states
        entrances = {depth: model.enter(encoded.hidden, state)[-1] for depth, state in below.items()}
        first = min(max(passage.scored - start, 0), end - start)
        targets = passage.targets[start + first : end]
        for index, (fires, state, depth) in enumerate(zip(placements, states, depths, strict=True)):
            part = torch.from_numpy(fires[start:end].astype(bool)).to(model.device).unsqueeze(0)
            chosen = None if everywhere[index] else part
            given = entrances[depth]
            output = model.combine(encoded.hidden, chosen, state, propagate=somewhere[index], entrance=given)
            losses = F.cross_entropy(model.head(output[0, first:]), targets, reduction="none")
            # In double precision: the sum over thousands of bytes has no fourth decimal in single.
            nats[index] += losses.double().sum().item()
        progress(int(passage.sizes[start + first : end].sum()))
    return nats / math.log(2.0)
