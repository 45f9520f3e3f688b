"""Spending a number of tiles: the search for the price at which the dynamic programme stays within it.

Source: Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers". Plans that are cheapest
at some price are the corners of the lower convex hull of (tiles, bits lost). The search walks along the hull with the
slope between two corners as the next price, so that it ends at exactly the two corners around the wanted number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from model.ops.tiling import Bytes

_MARGIN = 1e-11
"""Of a cost, by which a plan must be cheaper to count as such: above the rounding of its sum."""


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """One tiling of a block."""

    fires: Bytes
    """[L] of 0 and 1."""
    tiles: int
    loss: float
    """Bits lost to staleness and to gaps."""

    def cost(self, price: float) -> float:
        """Bits lost and paid at ``price`` bits per tile."""
        return self.loss + price * self.tiles


Solver = Callable[[float], PlannedBlock]
"""The cheapest plan at a price in bits per tile."""


def spend_tiles(solve: Solver, wanted: int, dearest: float, start: PlannedBlock | None = None) -> PlannedBlock:
    """The plan that loses least among those on the convex hull with at most ``wanted`` tiles.

    Between two corners of the hull the plan follows one up to a byte at which both fire and the other from there on:
    every such mix is on the hull as well, and the one with most tiles up to ``wanted`` is taken.

    Args:
        solve: for one block. wanted: tiles that may be spent. dearest: a price at which the fewest tiles are bought.
        start: a plan of ``solve`` to begin at.

    Returns:
        A plan with at most ``wanted`` tiles, or the one with the fewest where there is none.
    """
    many = start if start is not None and start.tiles > wanted else solve(0.0)
    if many.tiles <= wanted:
        return many
    few = start if start is not None and start.tiles <= wanted else solve(dearest)
    while few.tiles < wanted:
        price = (few.loss - many.loss) / (many.tiles - few.tiles)
        found = solve(price)
        if found.cost(price) >= few.cost(price) - _MARGIN * abs(few.cost(price)):
            return _mix(many, few, wanted)
        if found.tiles > wanted:
            many = found
        else:
            few = found
    return few


def _mix(many: PlannedBlock, few: PlannedBlock, wanted: int) -> PlannedBlock:
    """One plan up to a byte at which both fire and the other from there on, with most tiles up to ``wanted``."""
    best, price = few, (few.loss - many.loss) / (many.tiles - few.tiles)
    common = np.flatnonzero(many.fires & few.fires) + 1
    for head, tail in ((many, few), (few, many)):
        tiles = np.cumsum(head.fires, dtype=np.int64)[common - 1]
        tiles += tail.tiles - np.cumsum(tail.fires, dtype=np.int64)[common - 1]
        tiles[tiles > wanted] = -1
        if len(tiles) and tiles.max() > best.tiles:
            cut = int(common[np.argmax(tiles)])
            fires = np.concatenate([head.fires[:cut], tail.fires[cut:]])
            # On the hull's edge between the two, whose slope is the price.
            best = PlannedBlock(fires, int(tiles.max()), few.loss - price * (int(tiles.max()) - few.tiles))
    return best
