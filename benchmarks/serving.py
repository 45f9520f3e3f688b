"""The server under load, over HTTP: throughput and latency against concurrency, budget and arrival rate.

    python -m benchmarks.serving [--quick] [--json] [--plot FILE] [--threads N]

Requests are seeded (:func:`benchmarks.load.workload`): code and prose of this repository, 16 to 4,096 bytes of prompt
and 32 to 128 tokens, log-uniform. Arms that are compared take turns in one run; a ratio is the median over the turns.

- ``throughput_ratio_32_to_1``: generated tokens per second with 32 clients over one.
- ``engine_overhead_ratio_16``: schedule and postprocess over the whole step, by the server's own histogram, with 16
  clients whose prompts have at most 64 bytes, so that long prefills do not hide it.
- ``cheap_beside_full_ratio``: time of a request at budget 1/4 beside 15 at full budget over its time beside 15 like
  itself; ``cheap_tokens_unchanged``: its text was the same every time.
- ``transformers_generate_ratio``: generated tokens per second with 32 clients over a FastAPI handler around
  transformers' ``generate``. The embedded model has two widths, which Mamba-2 has not, so both serve the plain Mamba-2
  of :mod:`benchmarks.parity`, ours through ``rheostat convert``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.load import Ask, Result, closed_loop, open_loop, poisson_arrivals, send, workload
from benchmarks.machine import describe_machine
from benchmarks.parity import SPEED, pair
from benchmarks.plots import plot_serving
from benchmarks.servers import Server, rheostat, transformers_handler
from benchmarks.summary import count_ends, latencies, token_rate
from model.convert import convert

FEW, MANY, BATCH = 1, 32, 16
MATES, CHEAP = 15, 0.25
TARGETS = {
    "throughput_ratio_32_to_1": ">= 8",
    "engine_overhead_ratio_16": "<= 0.1",
    "cheap_beside_full_ratio": "<= 1.3",
    "cheap_tokens_unchanged": "true",
    "transformers_generate_ratio": ">= 5",
}
_SHORT = 64
_ENDLESS = 8192
"""Tokens of a request that is there to run beside another, and is given up after it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    budgets: tuple[float, ...] = (1.0, 0.5, 0.25)
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    """Arrival rates of the open loop, as shares of the capacity."""
    reduced_concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Clients with which budgets below 1 are measured."""
    seconds: float = 12.0
    """Of one arm of a closed loop, of which the first quarter is not counted."""
    open_seconds: float = 60.0
    turns: int = 5
    """Repetitions of what a ratio is made of."""
    probes: int = 9
    """Repetitions of the cheap request."""


QUICK = Plan(
    concurrency=(1, 4, 16, 32, 64), reduced_concurrency=(16,), loads=(0.5, 0.8), seconds=6.0, open_seconds=15.0,
    turns=3, probes=5,
)  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within five minutes on two cores")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture, its format by its name")
    parser.add_argument("--threads", type=int, help="of the servers' models")
    arguments = parser.parse_args()
    report: dict[str, Any] = describe_machine() | measure(QUICK if arguments.quick else Plan(), arguments.threads)
    if arguments.plot:
        plot_serving(report, arguments.plot)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for key, target in TARGETS.items():
        value = report[key]
        shown = str(value).lower() if isinstance(value, bool) else f"{value:.3f}"
        print(f"{key:<30}{shown:>8}   (target {target})")
    print(f"{'clients':>8}{'budget':>8}{'tokens/s':>10}{'end to end p50':>16}{'p95':>8}")
    for row in report["closed_loop"]:
        end_to_end = row["latency"]["end_to_end"]
        print(
            f"{row['clients']:>8}{row['budget']:>8}{row['tokens_per_second']:>10.0f}"
            f"{end_to_end['p50'] or 0:>16.3f}{end_to_end['p95'] or 0:>8.3f}"
        )


def measure(plan: Plan, threads: int | None = None) -> dict[str, Any]:
    """Start the servers and measure all."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = stack.enter_context(rheostat(threads=threads))
        asyncio.run(closed_loop(server.address, workload(0), 2, min(2.0, plan.seconds)))  # first allocations
        server.wait_until_idle()
        report = closed_loops(server, plan)
        report |= engine_overhead(server, plan)
        report |= asyncio.run(cheap_beside_full(server, plan))
        report["open_loop"] = open_loops(server, plan, report["capacity_per_second"])
        source, converted = Path(folder) / "source", Path(folder) / "converted"
        plain: Any = pair(SPEED)[1]
        plain.save_pretrained(source)
        convert(source, converted)
        own = stack.enter_context(rheostat("--checkpoint", str(converted), threads=threads))
        theirs = stack.enter_context(transformers_handler(source, threads))
        report |= beside_transformers(own, theirs, plan)
    return report


def run_closed(
    server: Server, asks: Iterator[Ask], clients: int, seconds: float, *, stream: bool = True
) -> tuple[float, list[Result]]:
    """Tokens per second and results of a closed loop; the server is at rest afterwards.

    Without ``stream`` the server is taken for one that goes on with what is given up, and it is all waited for.
    """
    began = time.monotonic()
    loop = closed_loop(server.address, asks, clients, seconds, stream=stream, abandon=stream)
    results = asyncio.run(loop)
    if stream:
        server.wait_until_idle()
    return token_rate(results, began + seconds / 4, began + seconds), results


def closed_loops(server: Server, plan: Plan) -> dict[str, Any]:
    """Throughput and latency by number of clients and budget; the ratio of many clients to one; the capacity."""
    rates: dict[tuple[int, float], list[float]] = defaultdict(list)
    results: dict[tuple[int, float], list[Result]] = defaultdict(list)

    def run(clients: int, budget: float, seed: int) -> None:
        rate, found = run_closed(server, workload(seed, budget), clients, plan.seconds)
        rates[clients, budget].append(rate)
        results[clients, budget] += found

    for turn in range(plan.turns):
        run(FEW, 1.0, turn)
        run(MANY, 1.0, turn)
    for budget in plan.budgets:
        for clients in plan.concurrency if budget == 1.0 else plan.reduced_concurrency:
            if (clients, budget) not in rates:
                run(clients, budget, seed=50)
    rows = [
        {
            "clients": clients,
            "budget": budget,
            "tokens_per_second": statistics.median(rates[clients, budget]),
            "latency": latencies(results[clients, budget]),
            "ends": count_ends(results[clients, budget]),
        }
        for clients, budget in sorted(rates, key=lambda arm: (-arm[1], arm[0]))
    ]
    ratios = [many / few for few, many in zip(rates[FEW, 1.0], rates[MANY, 1.0], strict=True)]
    return {
        "throughput_ratio_32_to_1": statistics.median(ratios),
        "throughput_ratios": ratios,
        "closed_loop": rows,
        "capacity_per_second": statistics.median(rates[MANY, 1.0]) / _mean_tokens(),
    }


def _mean_tokens() -> float:
    """Of the requests of a workload, whatever its seed."""
    return statistics.fmean(ask.tokens for ask, _ in zip(workload(0), range(2000), strict=False))


def engine_overhead(server: Server, plan: Plan) -> dict[str, Any]:
    """The share of schedule and postprocess in the steps of a batch of 16, requests that come and go included."""
    shares, sizes = [], []
    for turn in range(plan.turns):
        before = server.metrics()
        run_closed(server, workload(100 + turn, longest=_SHORT), BATCH, plan.seconds)
        after = server.metrics()
        spent = {name: after[name] - before[name] for name in after if name in before}
        parts = {
            part: spent[f'rheostat_engine_step_seconds_sum{{part="{part}"}}']
            for part in ("schedule", "run", "postprocess")
        }
        shares.append((parts["schedule"] + parts["postprocess"]) / sum(parts.values()))
        sizes.append(spent["rheostat_batch_size_sum"] / spent["rheostat_batch_size_count"])
    return {
        "engine_overhead_ratio_16": statistics.median(shares),
        "engine_overhead_ratios": shares,
        "engine_overhead_mean_batch": statistics.median(sizes),
    }


async def cheap_beside_full(server: Server, plan: Plan) -> dict[str, Any]:
    """The same request at a quarter of the compute beside dear ones and beside cheap ones, by turns."""
    probe = Ask(next(workload(7)).prompt[:256], 64, CHEAP, seed=7)
    turns = []
    for turn in range(plan.probes):
        full = await _beside(server, probe, 1.0, 200 + turn)
        cheap = await _beside(server, probe, CHEAP, 200 + turn)
        turns.append((full, cheap))
    ratios = [full.latency / cheap.latency for full, cheap in turns]
    return {
        "cheap_beside_full_ratio": statistics.median(ratios),
        "cheap_beside_full_ratios": ratios,
        "cheap_tokens_unchanged": len({result.text for pair_ in turns for result in pair_}) == 1,
    }


async def _beside(server: Server, ask: Ask, budget: float, seed: int) -> Result:
    """What becomes of a request beside 15 others at ``budget`` that already generate."""
    asks = workload(seed, budget, (_ENDLESS, _ENDLESS), longest=_SHORT)
    mates = [Result(mate, time.monotonic()) for mate, _ in zip(asks, range(MATES), strict=False)]
    tasks = [asyncio.create_task(send(server.address, mate)) for mate in mates]
    while not all(mate.events for mate in mates):
        await asyncio.sleep(0.01)
    result = Result(ask, time.monotonic())
    await send(server.address, result)
    assert not any(task.done() for task in tasks), "the others run longer than the request"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(server.wait_until_idle)
    return result


def open_loops(server: Server, plan: Plan, capacity: float) -> list[dict[str, Any]]:
    """Latency when requests come at random, at shares of the capacity (requests per second of 32 clients)."""
    rows = []
    for index, share in enumerate(plan.loads):
        arrivals = poisson_arrivals(300 + index, share * capacity, plan.open_seconds)
        results = asyncio.run(open_loop(server.address, workload(300 + index), arrivals))
        server.wait_until_idle()
        rows.append(
            {
                "share_of_capacity": share,
                "requests_per_second": share * capacity,
                "latency": latencies(results),
                "ends": count_ends(results),
            }
        )
    return rows


def beside_transformers(own: Server, theirs: Server, plan: Plan) -> dict[str, Any]:
    """Throughput with 32 clients over that of a handler around transformers' ``generate``, by turns."""
    rates = []
    for turn in range(plan.turns):
        ours, _ = run_closed(own, workload(400 + turn), MANY, plan.seconds)
        other, _ = run_closed(theirs, workload(400 + turn), MANY, plan.seconds, stream=False)
        rates.append((ours, other))
    ratios = [ours / other for ours, other in rates]
    return {
        "transformers_generate_ratio": statistics.median(ratios),
        "transformers_generate_ratios": ratios,
        "transformers_model": SPEED,
        "transformers_version": version("transformers"),
    }


if __name__ == "__main__":
    main()
