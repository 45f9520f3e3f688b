"""Very small runs of the benchmarks against real servers: every key is there, and what must hold whatever the speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.overload import Calm, run_study
from benchmarks.plots import plot_overload, plot_serving
from benchmarks.servers import rheostat
from benchmarks.serving import TARGETS, Plan, measure

TINY = Plan(
    concurrency=(1, 2), budgets=(1.0, 0.25), reduced_concurrency=(2,), loads=(0.5,), seconds=1.5, open_seconds=1.0,
    turns=1, probes=1, longest=64, tokens=(4, 8),
)  # fmt: skip


@pytest.mark.filterwarnings("default")  # transformers, and what it imports, warn as they please
def test_a_very_small_run_yields_every_key_and_a_picture(tmp_path: Path) -> None:
    report = measure(TINY, threads=1)
    assert set(TARGETS) <= set(report)
    assert report["cheap_tokens_unchanged"] is True
    assert 0.0 < report["engine_overhead_ratio_16"] < 1.0
    assert {(row["clients"], row["budget"]) for row in report["closed_loop"]} == {(1, 1), (2, 1), (32, 1), (2, 0.25)}
    for row in (*report["closed_loop"], *report["open_loop"]):
        assert set(row["latency"]) == {"first_token", "inter_token", "end_to_end"}
        assert row["ends"]["error"] == row["ends"]["refused"] == 0
    json.dumps(report)
    plot_serving(report, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_lost_in_a_very_small_overload(tmp_path: Path) -> None:
    with rheostat("--max-running", "2", "--max-waiting", "1", threads=1) as server:
        report = run_study(server, Calm(unloaded=0.5, capacity=20.0), seconds=2.0, factor=3.0)
    assert set(report["arms"]) == {"fixed", "lowered"}
    for arm in report["arms"].values():
        assert [wrong for wrong in arm["conservation"] if "memory" not in wrong] == []  # two seconds say nothing of it
        assert arm["ends"]["sent"] == arm["ends"]["answer"] + arm["ends"]["refused"] > 0
        assert arm["ends"]["refused"] > 0
    assert set(report["goodput_by_target"]["3"]) == {"fixed", "lowered"}
    json.dumps(report)
    plot_overload(report, tmp_path / "overload.png")
    assert (tmp_path / "overload.png").read_bytes().startswith(b"\x89PNG")
