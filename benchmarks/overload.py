"""Twice what the server can do, for minutes: budgets that may be lowered under load against fixed ones with 429 only.

    python -m benchmarks.overload [--seconds N] [--json] [--plot FILE] [--threads N]

Both arms send the same requests at the same times (:func:`benchmarks.load.workload`, Poisson arrivals) to one server, one
arm with a budget of 1 and one with ``{"target": 1.0, "min": 0.3}``. The capacity is what 32 clients get at full budget.

Goodput counts answers within the latency target, which is ``--target-factor`` times the 95th percentile of one client alone
on the server. ``goodput_by_target`` has the same for other factors, so that the choice can be judged. A queue that takes
longer than the target helps nobody, so ``--max-waiting`` bounds it, the same for both arms.

The exit status is 1 if a request was lost, ended twice or left something behind (``conservation``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.load import End, Result, closed_loop, open_loop, poisson_arrivals, workload
from benchmarks.machine import describe_machine
from benchmarks.plots import plot_overload
from benchmarks.servers import GAUGES, Server, rheostat
from benchmarks.summary import by_time, check_conservation, count_ends, latencies, percentiles, token_rate

ARMS: dict[str, float | dict[str, float]] = {"fixed": 1.0, "lowered": {"target": 1.0, "min": 0.3}}
CLIENTS, OVERLOAD, BINS = 32, 2.0, 30
FACTORS = (1, 2, 3, 5, 10, 20, 50)
_MOST_GROWTH = 0.05
"""Share by which the server's memory may grow and still counts as flat."""


def main() -> int:
    """Run the study; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="of each arm")
    parser.add_argument(
        "--calibration-seconds", type=float, default=20.0, help="of each of the two measurements before"
    )
    parser.add_argument("--target-factor", type=float, default=3.0)
    parser.add_argument("--max-waiting", type=int, default=16, help="setting of the server")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture, its format by its name")
    parser.add_argument("--threads", type=int, help="of the server's model")
    arguments = parser.parse_args()
    options = ("--max-waiting", str(arguments.max_waiting))
    with rheostat(*options, threads=arguments.threads) as server:
        study = run_study(server, arguments.seconds, arguments.calibration_seconds, arguments.target_factor)
    report: dict[str, Any] = describe_machine() | {"server_options": options} | study
    if arguments.plot:
        plot_overload(report, arguments.plot)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"goodput lowered / fixed: {report['goodput_ratio']} (target >= 1.5)")
        print(f"latency target: {report['latency_target_seconds']:.3f} s")
        for name, arm in report["arms"].items():
            print(
                f"{name:>8}: goodput {arm['goodput']:.2f}/s, ends {arm['ends']}, wrong: {arm['conservation'] or 'nothing'}"
            )
    return int(any(arm["conservation"] for arm in report["arms"].values()))


def run_study(server: Server, seconds: float, calibration: float, factor: float) -> dict[str, Any]:
    """Calibrate, then both arms one after the other; see the module."""
    began = time.monotonic()
    alone = asyncio.run(closed_loop(server.address, workload(1), 1, calibration))
    unloaded = latencies(alone)["end_to_end"]["p95"]
    assert unloaded is not None, "one client gets answers"
    server.wait_until_idle()
    began = time.monotonic()
    busy = asyncio.run(closed_loop(server.address, workload(2), CLIENTS, calibration))
    tokens = token_rate(busy, began + calibration / 4, began + calibration)
    capacity = tokens * len(busy) / sum(result.ask.tokens for result in busy)
    server.wait_until_idle()
    arrivals = poisson_arrivals(3, OVERLOAD * capacity, seconds)
    runs = {name: run_arm(server, budget, arrivals, seconds, factor * unloaded) for name, budget in ARMS.items()}
    goodput = {
        f"{times:g}": {name: _goodput(results, times * unloaded) / seconds for name, (_, results) in runs.items()}
        for times in sorted({*FACTORS, factor})
    }
    fixed, lowered = (goodput[f"{factor:g}"][name] for name in ("fixed", "lowered"))
    return {
        "seconds": seconds,
        "capacity_per_second": capacity,
        "arrivals_per_second": OVERLOAD * capacity,
        "unloaded_p95_seconds": unloaded,
        "latency_target_seconds": factor * unloaded,
        "goodput_ratio": lowered / fixed if fixed else None,
        "goodput_by_target": goodput,
        "arms": {name: arm for name, (arm, _) in runs.items()},
    }


def run_arm(
    server: Server, budget: float | dict[str, float], arrivals: list[float], seconds: float, target: float
) -> tuple[dict[str, Any], list[Result]]:
    """One arm, from rest to rest: what became of its requests, and what it left behind."""
    before, memory = server.metrics(), server.resident_bytes()
    began = time.monotonic()
    results = asyncio.run(open_loop(server.address, workload(4, budget), arrivals))
    server.wait_until_idle()
    after, grown = server.metrics(), server.resident_bytes()
    ends = count_ends(results)
    finished = _counts(after, before)
    wrong = check_conservation(ends, finished)
    wrong += [f"{name} is {after[name]:g} at the end" for name in GAUGES if after[name]]
    if grown > memory * (1 + _MOST_GROWTH):
        wrong.append(f"the server's memory grew from {memory} to {grown} bytes")
    answers = [result for result in results if result.end is End.ANSWER]
    arm = {
        "budget": budget,
        "ends": ends,
        "conservation": wrong,
        "goodput": _goodput(results, target) / seconds,
        "latency": latencies(results),
        "granted": percentiles([result.usage["compute"]["granted"] for result in answers]),
        "resident_bytes": {"before": memory, "after": grown},
        "over_time": by_time(results, began, seconds, BINS, target),
    }
    return arm, results


def _goodput(results: list[Result], target: float) -> int:
    return sum(result.end is End.ANSWER and result.latency <= target for result in results)


def _counts(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """Requests that the server counted between two readings, by how they ended."""

    def count(name: str) -> float:
        return after[name] - before[name]

    ended = "rheostat_request_success_total"
    good = sum(count(f'{ended}{{finished_reason="{reason}"}}') for reason in ("stop", "length"))
    return {
        "finished": good,
        "rejected": count("rheostat_request_rejected_total"),
        "failed": count(ended) - good,
    }


if __name__ == "__main__":
    sys.exit(main())
