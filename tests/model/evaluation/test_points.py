from __future__ import annotations

from fractions import Fraction

import pytest

from model.evaluation.arms import ADAPTIVE, PLANNED_ARMS, STRICT_ARMS, Arm, analysed, make_arms
from model.evaluation.passages import FUTURE_CHARGE, Protocol
from model.evaluation.points import Point, make_points, match_rates
from model.evaluation.report import charge
from model.evaluation.scoring import spent_flops
from model.lm import AdaptiveAttentionSystem
from tests.model.evaluation.texts import CALIBRATION, document, read, signals
from tests.model.shapes import SHALLOW, random_model


def test_points_are_budgets_and_trunk_rates() -> None:
    cost = random_model().cost
    points = make_points(cost, [1.0, 0.7, "floor"], [Fraction(1, 2)])
    assert [point.label for point in points] == ["1", "0.7", "floor", "rate 1/2"]
    assert [point.budget for point in points[:3]] == [1.0, 0.7, "floor"]
    assert points[3].budget == pytest.approx(cost.budget(0.5, logits=1))
    assert (points[3].rates.prefill, points[3].rates.decode) == (0.5, 0.5)
    assert points[1].rates == cost.rates(0.7)
    assert [point.end for point in points] == [1, None, 0, None]


def test_a_plan_is_charged_for_the_future_only_where_it_places_something() -> None:
    model = random_model(SHALLOW)
    everywhere = model.cost.budget(1.0, logits=1, depth=1)
    points = make_points(model.cost, [1.0, 0.9, everywhere, "floor"], [])
    assert [point.rates.depth for point in points] == [None, None, 1, 1]
    shipped, blind = make_arms(model, [ADAPTIVE, "uniform"], Protocol.ORACLE, CALIBRATION)
    assert [charge(Protocol.ORACLE, shipped, point) for point in points] == [0.0, FUTURE_CHARGE, 0.0, 0.0]
    assert [charge(Protocol.ORACLE, blind, point) for point in points] == [0.0] * 4
    assert [charge(Protocol.SERVING, shipped, point) for point in points] == [0.0] * 4


@pytest.mark.parametrize(
    ("protocol", "names"),
    [(Protocol.STRICT, STRICT_ARMS), (Protocol.SERVING, PLANNED_ARMS), (Protocol.ORACLE, PLANNED_ARMS)],
)
def test_every_arm_spends_what_the_shipped_rule_spends(protocol: Protocol, names: tuple[str, ...]) -> None:
    model = random_model()
    texts = read(model, protocol, [document(1600 + 300 * seed, seed) for seed in range(3)])
    arms = {arm.name: arm for arm in make_arms(model, names, protocol, CALIBRATION)}
    shipped = arms.pop(ADAPTIVE)
    for point in make_points(model.cost, [0.75], [Fraction(1, 4)]):
        spent, fires = used(model, shipped, texts, point, point.rates)
        for arm in arms.values():
            rates = match_rates(arm, shipped, model.cost, texts, signals(arm, texts), point, fires)
            own, fired = used(model, arm, texts, point, rates)
            if arm.equal_rate:
                assert fired == pytest.approx(fires, rel=0.01), arm.name
                assert own < spent
            else:
                assert own == pytest.approx(spent, rel=0.01), arm.name
                assert arm.pays or fired > fires


def used(model: AdaptiveAttentionSystem, arm: Arm, texts, point: Point, rates) -> tuple[int, int]:
    placed = [arm.place(text.passage, arm.signal(text), rates) for text in texts]
    paid = analysed(arm, rates)
    spent = sum(
        spent_flops(model.cost, text.passage, int(fires.sum()), analysed=paid)
        for text, fires in zip(texts, placed, strict=True)
    )
    return spent, sum(int(fires.sum()) for fires in placed)
