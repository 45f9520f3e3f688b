from __future__ import annotations

import pytest

from service.engine.load import LoadControl, Pace


def run(load: LoadControl, start: float, seconds: float, wait: float) -> list[float]:
    """The ease every quarter of a second."""
    eases = []
    for tick in range(int(seconds * 4)):
        load.update(start + tick / 4, wait)
        eases.append(load.ease)
    return eases


def test_pressure_lowers_a_step_per_patience_down_to_the_least() -> None:
    eases = run(LoadControl(1.0), 0.0, 6.0, wait=2.0)
    assert eases == [0.75] * 4 + [0.5] * 4 + [0.25] * 4 + [0.0] * 12


def test_calm_raises_slowly_and_what_is_between_changes_nothing() -> None:
    load = LoadControl(1.0)
    run(load, 0.0, 2.0, wait=2.0)
    assert set(run(load, 2.0, 20.0, wait=0.5)) == {0.5}
    eases = run(load, 22.0, 12.0, wait=0.0)
    assert eases == [0.5] * 15 + [0.75] * 16 + [1.0] * 17


def test_a_time_without_work_is_calm() -> None:
    load = LoadControl(1.0)
    run(load, 0.0, 9.0, wait=2.0)
    assert load.ease == 0.0
    assert load.update(8.75 + 8.5, 0.0)
    assert load.ease == 0.5
    assert load.update(3600.0, 0.0)
    assert load.ease == 1.0


def test_refusals_are_pressure_too() -> None:
    load = LoadControl(1.0)
    for tick in range(16):
        if tick % 2 == 0:
            load.refused(tick / 4)
        load.update(tick / 4, 0.0)
    assert load.ease == 0.0
    assert set(run(load, 4.0, 4.0, wait=0.0)) == {0.0}
    assert run(load, 8.0, 4.0, wait=0.0)[-1] == 0.25


def test_waits_that_flicker_around_the_threshold_lower_at_most_a_step_at_a_time() -> None:
    load = LoadControl(1.0)
    changes = sum(load.update(tick / 4, 1.1 if tick % 2 else 0.9) for tick in range(400))
    assert changes <= len(LoadControl.STEPS) - 1, "it never goes up again without calm"


def test_the_pace_follows_recent_work_and_what_requests_come_to() -> None:
    pace = Pace()
    assert pace.seconds_for(100) == 0.0
    for _ in range(100):
        pace.worked(10, 1.0)
    assert pace.seconds_for(100) == pytest.approx(10.0)
    for _ in range(100):
        pace.worked(50, 1.0)
        pace.ended(used=10, reserved=40)
    assert pace.seconds_for(100) == pytest.approx(0.5)
