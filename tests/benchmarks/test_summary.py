"""Figures made of results, against values worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.load import Ask, End, Result
from benchmarks.overload import growth
from benchmarks.summary import by_time, check_conservation, count_ends, latencies, percentiles, token_rate

ASK = Ask("x", 4, 1.0, 0)
COUNTED = {"finished": 2.0, "rejected": 1.0, "failed": 0.0}


def result(due: float, events: list[float], end: End | None = End.ANSWER, tokens: int | None = None) -> Result:
    ended = events[-1] if events else due
    usage = {"completion_tokens": len(events) if tokens is None else tokens, "compute": {"granted": 0.5}}
    return Result(ASK, due, events, end=end, ended=ended, usage=usage if end is End.ANSWER else {})


def test_percentiles_are_interpolated() -> None:
    assert percentiles([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx({"p50": 3.0, "p95": 4.8, "p99": 4.96})
    assert percentiles([7.0]) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}


def test_latencies_are_of_answers_and_count_from_when_they_were_due() -> None:
    results = [
        result(1.0, [3.0, 4.0, 6.0]),
        result(0.0, [2.0, 4.0], tokens=5),
        result(0.0, [7.0]),
        result(0.0, [100.0], end=None),
        result(0.0, [], End.REFUSED),
    ]
    found = latencies(results)
    assert found["first_token"]["p50"] == 2.0
    assert found["inter_token"] == pytest.approx({"p50": 1.0, "p95": 1.45, "p99": 1.49})
    assert found["end_to_end"]["p50"] == 5.0


def test_a_rate_counts_arrivals_in_the_window_between_the_first_and_the_last() -> None:
    steady = [result(0.0, [float(second) for second in range(20)])]
    assert token_rate(steady, 5.0, 15.0) == 1.0
    abandoned = [result(0.0, [float(second) for second in range(20)], end=None)]
    assert token_rate(steady + abandoned, 5.0, 15.0) == pytest.approx(21 / 10)
    whole = [result(0.0, [at], tokens=8) for at in (2.0, 6.0, 10.0)]  # answers of 8 tokens every 4 seconds
    assert token_rate(whole, 1.0, 100.0) == 2.0
    merged = [result(0.0, [1.0, 2.0, 3.0], tokens=6)]  # two tokens per arrival
    assert token_rate(merged, 0.0, 10.0) == 2.0
    assert token_rate(whole, 3.0, 7.0) == 0.0


def test_every_request_is_counted_once_and_held_against_the_server() -> None:
    results = [result(0.0, [1.0]), result(0.0, [1.0]), result(0.0, [], End.REFUSED)]
    ends = count_ends(results)
    assert ends == {"sent": 3, "open": 0, "answer": 2, "refused": 1, "error": 0}
    assert check_conservation(ends, COUNTED) == []


@pytest.mark.parametrize("kind", COUNTED)
def test_a_difference_to_the_server_is_noticed(kind: str) -> None:
    ends = {"sent": 3, "open": 0, "answer": 2, "refused": 1, "error": 0}
    (wrong,) = check_conservation(ends, COUNTED | {kind: COUNTED[kind] + 1})
    assert kind in wrong


def test_a_request_that_never_ended_is_noticed() -> None:
    (wrong,) = check_conservation({"sent": 4, "open": 1, "answer": 2, "refused": 1, "error": 0}, COUNTED)
    assert "1 requests did not end" in wrong


def test_results_are_sorted_into_the_time_at_which_they_were_due() -> None:
    results = [result(10.5, [11.0]), result(11.9, [14.0]), result(12.5, [], End.REFUSED), result(13.0, [13.5])]
    early, late = by_time(results, begin=10.0, seconds=4.0, bins=2, target=1.0)
    assert (early["seconds"], early["goodput"], early["refused"], early["granted"]) == (1.0, 0.5, 0.0, 0.5)
    assert (late["seconds"], late["goodput"], late["refused"]) == (3.0, 0.5, 0.5)
    assert early["latency"]["p50"] == pytest.approx(1.3)
    (empty,) = by_time([], 0.0, 1.0, 1, 1.0)
    assert empty["granted"] is None


def test_memory_that_settles_is_flat_and_memory_that_leaks_is_not() -> None:
    assert growth([100, 150, 190, 200, 200, 200, 200, 200, 200]) == 0.0
    assert growth([100, 110, 120, 130, 140, 150, 160, 170, 180]) == pytest.approx(170 / 140 - 1)
    assert growth([100]) == 0.0
