"""Twice what the server can do, for minutes: budgets that may be lowered under load against fixed ones with 429 only.

    python -m benchmarks.overload [--seconds N] [--json] [--plot FILE] [--threads N]

Both arms send the same requests at the same times (:func:`benchmarks.load.workload`, Poisson arrivals) to one server,
one arm with a budget of 1 and one with ``{"target": 1.0, "min": 0.3}``. The capacity is what 32 clients get at full
budget from a server with default settings.

Goodput counts answers within the latency target: ``--target-factor`` times the 95th percentile of a client alone.
``goodput_by_target`` has other factors too, so that the choice can be judged. Requests that wait longer than the target
help nobody, so the server of both arms is set to hold no more than three quarters of capacity times target (Little's
law; ``--max-open`` overrides it), and answers 429 beyond.

The exit status is 1 if a request was lost, ended twice or left something behind (``conservation``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import End, Result, closed_loop, mean_tokens, open_loop, poisson_arrivals, workload
from benchmarks.machine import describe_machine
from benchmarks.plots import plot_overload
from benchmarks.servers import GAUGES, Server, rheostat
from benchmarks.summary import by_time, check_conservation, count_ends, latencies, percentiles, token_rate

ARMS: dict[str, float | dict[str, float]] = {"fixed": 1.0, "lowered": {"target": 1.0, "min": 0.3}}
CLIENTS, OVERLOAD, BINS = 32, 2.0, 30
FACTORS = (1, 2, 3, 5, 10, 20, 50)
RUNNING = 16
"""Sequences that a server runs at most, by default."""
MOST_GROWTH = 0.05
"""Share by which the server's memory may grow and still counts as flat."""


def main() -> int:
    """Run the study; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="of each arm")
    parser.add_argument("--calibration-seconds", type=float, default=20.0, help="of both measurements before")
    parser.add_argument("--target-factor", type=float, default=3.0)
    parser.add_argument("--max-open", type=int, help="requests that the server runs and lets wait")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture, its format by its name")
    parser.add_argument("--threads", type=int, help="of the server's model")
    arguments = parser.parse_args()
    with rheostat(threads=arguments.threads) as server:
        calm = calibrate(server, arguments.calibration_seconds)
    target = arguments.target_factor * calm.unloaded
    most = arguments.max_open or max(2, int(0.75 * calm.capacity * target))
    running = min(RUNNING, max(1, most * 3 // 4))
    options = ("--max-running", str(running), "--max-waiting", str(most - running))
    with rheostat(*options, threads=arguments.threads) as server:
        warm_up(server)
        study = run_study(server, calm, arguments.seconds, arguments.target_factor)
    report: dict[str, Any] = (
        describe_machine() | {"server_options": options, "server_threads": arguments.threads} | study
    )
    if arguments.plot:
        plot_overload(report, arguments.plot)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"goodput lowered / fixed: {report['goodput_ratio']} (target >= 1.5)")
        print(f"latency target: {report['latency_target_seconds']:.3f} s")
        for name, arm in report["arms"].items():
            print(f"{name:>8}: goodput {arm['goodput']:.2f}/s, {arm['ends']}, wrong: {arm['conservation']}")
    return int(any(arm["conservation"] for arm in report["arms"].values()))


@dataclass(frozen=True, slots=True)
class Calm:
    """A server before the overload."""

    unloaded: float
    """Seconds, the 95th percentile of one client's requests."""
    capacity: float
    """Requests per second of many clients."""


def calibrate(server: Server, seconds: float) -> Calm:
    """Measure both, so many seconds each."""
    warm_up(server)
    unloaded = latencies(asyncio.run(closed_loop(server.address, workload(1), 1, seconds)))["end_to_end"]["p95"]
    assert unloaded is not None, "one client gets answers"
    began = time.monotonic()
    busy = asyncio.run(closed_loop(server.address, workload(2), CLIENTS, seconds))
    tokens = token_rate(busy, began + seconds / 4, began + seconds)
    return Calm(unloaded, tokens / mean_tokens(workload(2)))


def warm_up(server: Server) -> None:
    """What is allocated once."""
    asyncio.run(closed_loop(server.address, workload(0), 2, 2.0))


def run_study(server: Server, calm: Calm, seconds: float, factor: float) -> dict[str, Any]:
    """Both arms, one after the other."""
    arrivals, target = poisson_arrivals(3, OVERLOAD * calm.capacity, seconds), factor * calm.unloaded
    runs = {name: run_arm(server, budget, arrivals, seconds, target) for name, budget in ARMS.items()}
    goodput = {
        f"{times:g}": {name: _goodput(results, times * calm.unloaded) / seconds for name, (_, results) in runs.items()}
        for times in sorted({*FACTORS, factor})
    }
    fixed, lowered = (goodput[f"{factor:g}"][name] for name in ("fixed", "lowered"))
    return {
        "seconds": seconds,
        "capacity_per_second": calm.capacity,
        "arrivals_per_second": OVERLOAD * calm.capacity,
        "unloaded_p95_seconds": calm.unloaded,
        "latency_target_seconds": target,
        "goodput_ratio": lowered / fixed if fixed else None,
        "goodput_by_target": goodput,
        "arms": {name: arm for name, (arm, _) in runs.items()},
    }


def run_arm(
    server: Server, budget: float | dict[str, float], arrivals: list[float], seconds: float, target: float
) -> tuple[dict[str, Any], list[Result]]:
    """One arm, from rest to rest: what became of its requests, and what it left behind."""
    before, at_rest, began = server.metrics(), server.resident_bytes(), time.monotonic()
    results, memory = asyncio.run(_watched(server, open_loop(server.address, workload(4, budget), arrivals), seconds))
    server.wait_until_idle()
    after = server.metrics()
    ends = count_ends(results)
    finished = _counts(after, before)
    wrong = check_conservation(ends, finished)
    wrong += [f"{name} is {after[name]:g} at the end" for name in GAUGES if after[name]]
    if growth(memory) > MOST_GROWTH:
        wrong.append(f"the server's memory grows by {growth(memory):.0%}")
    answers = [result for result in results if result.end is End.ANSWER]
    arm = {
        "budget": budget,
        "ends": ends,
        "conservation": wrong,
        "goodput": _goodput(results, target) / seconds,
        "latency": latencies(results),
        "granted": percentiles([result.usage["compute"]["granted"] for result in answers]),
        "resident_bytes": {"before": at_rest, "after": server.resident_bytes(), "over_time": memory},
        "resident_growth": growth(memory),
        "over_time": by_time(results, began, seconds, BINS, target),
    }
    return arm, results


async def _watched(
    server: Server, load: Coroutine[Any, Any, list[Result]], seconds: float
) -> tuple[list[Result], list[int]]:
    """What a load leads to, and the server's memory in the meantime, at equal distances."""
    memory: list[int] = []

    async def watch() -> None:
        while True:
            memory.append(server.resident_bytes())
            await asyncio.sleep(seconds / BINS)

    watching = asyncio.create_task(watch())
    try:
        return await load, memory
    finally:
        watching.cancel()


def growth(memory: Sequence[int]) -> float:
    """By what share memory grows between the middle third of its readings and the last: the first fills caches."""
    third = max(1, len(memory) // 3)
    return statistics.median(memory[-third:]) / statistics.median(memory[-2 * third : -third] or memory) - 1


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
