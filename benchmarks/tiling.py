"""What placing tiles costs: the dynamic programme at one price, whole plans at a budget, and their share of prefill.

    python -m benchmarks.tiling --json

On the densities that the checkpoint gives to this project's own source. The programme runs on one core at the price
of each fire rate; "simple" is the same programme without dropping starts, timed side by side. A plan is what serving
does: block by block, each held to the quota. Its share is of the time that the model takes to read the same prompt at
the same budget, plans included, by turns in every round. The medians over the rounds are reported.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numba import njit

from benchmarks.budget_latency import sample_text
from benchmarks.machine import describe_machine
from model.adaptive.tiling import Pace
from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.device import set_threads
from model.lm import AdaptiveAttentionSystem
from model.ops.tiling import Floats, plan_block, staleness_table

TARGET_MS = 1.0
TARGET_SHARE = 0.02
BYTES = 8192


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="0.9,0.5,0.25,0.1,0.02", help="fire rates whose calibrated price is used")
    parser.add_argument("--budgets", default="0.9,0.75,0.5,0.4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--threads", type=int, help="of the model; the programme has one")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = load_checkpoint(arguments.checkpoint, torch.device("cpu"))
    tokens = torch.tensor([list(sample_text(BYTES).encode("ascii"))])
    first = model.config.depths[0]  # the stage that most budgets place, where there are several
    density = model.analyse(tokens, first)[0].numpy()
    programmes = [time_programme(model, density, float(rate)) for rate in arguments.rates.split(",")]
    budgets = [float(budget) for budget in arguments.budgets.split(",")]
    plans = [time_plan(model, tokens, budget, arguments.rounds) for budget in budgets]
    met = {
        "programme": max(row["milliseconds"] for row in programmes) <= TARGET_MS,
        "prefill_share": max(row["prefill_share"] for row in plans) <= TARGET_SHARE,
    }
    if arguments.json:
        setting = {"bytes": BYTES, "rounds": arguments.rounds, "model": model.config.name}
        targets = {"milliseconds": TARGET_MS, "prefill_share": TARGET_SHARE, "met": met}
        report = {**describe_machine(), **setting, "programmes": programmes, "plans": plans, "targets": targets}
        print(json.dumps(report, indent=2))
        return
    print(
        f"{'rate':>8}{'ms':>9}{'to simple':>11}   (dynamic programme, {BYTES} bytes, one price; target {TARGET_MS} ms)"
    )
    for row in programmes:
        print(f"{row['rate']:8.3f}{row['milliseconds']:9.3f}{row['ratio_to_simple']:11.3f}")
    print(f"{'budget':>8}{'ms':>9}{'of prefill':>12}   (plans of all blocks; target {TARGET_SHARE:.0%} of prefill)")
    for row in plans:
        print(f"{row['budget']:8.2f}{row['milliseconds']:9.3f}{row['prefill_share']:12.2%}")


@njit(cache=True)
def plan_simply(
    density: Floats, staleness: Floats, price: float, entry: float, min_size: int, max_size: int
) -> float:  # pragma: no cover - compiled
    """The least cost by the plain programme, which tries every size at every byte."""
    length = density.shape[0]
    best = np.full(length + 1, np.inf)
    best[0] = 0.0
    total = np.inf
    for start in range(length + 1):
        loss = best[start]
        stop = min(start + max_size, length)
        for byte in range(start, stop):
            size = byte - start + 1
            if size >= min_size:
                best[byte + 1] = min(best[byte + 1], loss + price + (entry if size > 1 else 0.0))
            loss += density[byte] * staleness[size]
        if start + max_size > length:
            total = min(total, loss)
    return total


def time_programme(model: AdaptiveAttentionSystem, density: Floats, rate: float) -> dict[str, float]:
    """Milliseconds of one solution over the whole text, and the ratio to the simple programme."""
    tiles = model.tiles
    table, price = staleness_table(tiles.tau, len(density)), math.exp(tiles.log_at(tiles.log_prices, rate))
    sizes, entry = (tiles.min_tile_size, tiles.max_tile_size), tiles.restart_loss
    fast, simple = (
        plan_block(density, table, price, entry, 0, *sizes)[2],
        plan_simply(density, table, price, entry, *sizes),
    )
    assert abs(fast - simple) <= 1e-9 * simple, "the two programmes disagree"
    times = [
        (
            elapsed(lambda: plan_block(density, table, price, entry, 0, *sizes)),
            elapsed(lambda: plan_simply(density, table, price, entry, *sizes)),
        )
        for _ in range(31)
    ]
    return {
        "rate": rate,
        "tiles_per_byte": plan_block(density, table, price, entry, 0, *sizes)[1] / len(density),
        "milliseconds": 1e3 * statistics.median(fast for fast, _ in times),
        "ratio_to_simple": statistics.median(fast / simple for fast, simple in times),
    }


def time_plan(model: AdaptiveAttentionSystem, tokens: torch.Tensor, budget: float, rounds: int) -> dict[str, float]:
    """Milliseconds of the plans of a whole prompt at one budget, and their share of reading it."""
    bought, size = model.cost.rates(budget), model.config.block_size
    rate, (_, tiles) = bought.prefill, model.placement(bought.depth)
    density = model.analyse(tokens, bought.depth)[0].numpy()

    def plan() -> None:
        fires = last_fire = 0
        for start in range(0, len(density), size):
            pace = Pace(start, last_fire, fires, rate * start)
            ends = np.flatnonzero(tiles.plan(density[start : start + size], rate, pace)) + 1
            fires += len(ends)
            last_fire = start + int(ends[-1]) if len(ends) else last_fire

    def read() -> None:
        state = model.allocate_state(1, depth=bought.depth)
        for piece in tokens.split(size, dim=1):
            model.prefill(piece, state, rate, predict=False)

    plan()
    times = [(elapsed(plan), elapsed(read)) for _ in range(rounds)]
    return {
        "budget": budget,
        "rate": rate,
        "milliseconds": 1e3 * statistics.median(planned for planned, _ in times),
        "prefill_milliseconds": 1e3 * statistics.median(whole for _, whole in times),
        "prefill_share": statistics.median(planned / whole for planned, whole in times),
    }


def elapsed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
