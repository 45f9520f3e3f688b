from __future__ import annotations

import math

import pytest

from model.cost import CostModel
from service.engine.budget import ComputeBudget, Reason, grant
from tests.service.servers import TINY


@pytest.mark.parametrize("share", [0.0, -1.0, 2.0, math.nan, math.inf])
def test_shares_outside_the_range_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="target must be a number"):
        ComputeBudget.exactly(share)


def test_a_minimum_above_the_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min 0\.6 must not be above target 0\.5"):
        ComputeBudget(0.5, 0.6)


def test_a_budget_that_pays_for_tiles_is_granted_as_asked() -> None:
    cost = CostModel(TINY)
    given = grant(ComputeBudget.exactly(0.9), cost)
    assert (given.requested, given.granted, given.reason) == (0.9, 0.9, Reason.REQUESTED)
    assert cost.budget(given.rates.decode, logits=1) == pytest.approx(0.9, abs=1e-12)
    assert cost.budget(given.rates.prefill, logits=0) == pytest.approx(0.9, abs=1e-12)


def test_a_smaller_depth_that_runs_everywhere_is_granted_what_it_costs() -> None:
    depths = {"trunk_layers": 3, "shallow_depths": (2,)}
    cost = CostModel(TINY.model_copy(update=depths))
    everywhere, start = cost.budget(1.0, logits=1, depth=2), cost.budget(1 / TINY.max_tile_size, logits=1)
    for share in (everywhere, math.nextafter(start, 0.0)):
        given = grant(ComputeBudget.exactly(share), cost)
        assert (given.requested, given.granted, given.reason) == (share, everywhere, Reason.DEPTH)
        assert (given.rates.prefill, given.rates.decode, given.rates.depth) == (1.0, 1.0, 2)
    assert grant(ComputeBudget.exactly(start), cost).reason is Reason.REQUESTED
    assert grant(ComputeBudget.exactly(1.0), cost).granted == 1.0
    lowered = grant(ComputeBudget(1.0, everywhere), cost).at(0.0, cost)
    assert (lowered.granted, lowered.reason) == (everywhere, Reason.LOAD)


def test_a_budget_that_does_not_is_granted_the_floor() -> None:
    cost = CostModel(TINY)
    for share in (0.01, cost.floor, math.nextafter(cost.least_adaptive, 0)):
        given = grant(ComputeBudget.exactly(share), cost)
        assert given.reason is Reason.FLOOR
        assert given.granted == cost.floor
        assert given.rates.prefill == given.rates.decode == 0.0
