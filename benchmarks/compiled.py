"""What the compiled loops of a CPU save: time of a decoding step and of a prompt, as ratios to their plain twins.

    python -m benchmarks.compiled --json

Every round runs both, one after the other, on the same bytes and weights; the report has the median of the rounds'
ratios. The plain step and the chunked scan are what other devices run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import model.layers.mamba2
import model.lm
from benchmarks.budget_latency import sample_text
from benchmarks.machine import describe_machine
from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.cost import Rates
from model.device import set_threads
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import ByteTokenizer

WARM_UP = 20
"""Bytes that a batch reads before it is timed."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="1,0.4")
    parser.add_argument("--batches", default="1,8", help="sequences decoding together")
    parser.add_argument("--lengths", default="8,32,128,512", help="bytes of a prompt, at most a block")
    parser.add_argument("--steps", type=int, default=100, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--checkpoint", type=Path, default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    system = load_checkpoint(arguments.checkpoint)
    tokens = torch.tensor(ByteTokenizer().encode(sample_text(4096)))
    rows: list[dict[str, float | str]] = []
    for budget in map(float, arguments.budgets.split(",")):
        rates = system.cost.rates(budget)
        for batch in map(int, arguments.batches.split(",")):
            columns = tokens[: batch * (WARM_UP + arguments.steps)].view(batch, -1)
            ratio = compare(partial(time_steps, system, columns, rates), arguments.rounds)
            rows.append({"what": "step", "budget": budget, "size": batch, "time_ratio": ratio})
        for length in map(int, arguments.lengths.split(",")):
            ratio = compare(partial(time_prefill, system, tokens[None, :length], rates), arguments.rounds)
            rows.append({"what": "prefill", "budget": budget, "size": length, "time_ratio": ratio})
    if arguments.json:
        print(json.dumps({**describe_machine(), "model": system.config.name, "rows": rows}, indent=2))
        return
    print(f"{'':>8}{'budget':>8}{'size':>6}{'compiled / plain':>18}")
    for row in rows:
        print(f"{row['what']:>8}{row['budget']:>8}{row['size']:>6}{row['time_ratio']:>18.3f}")


def compare(measure: Callable[[], float], rounds: int) -> float:
    """Median over the rounds of the compiled time divided by the plain time."""
    ratios = []
    for _ in range(rounds + 1):
        fast = measure()
        with plain():
            ratios.append(fast / measure())
    return statistics.median(ratios[1:])  # the first one compiles and allocates


@contextmanager
def plain() -> Iterator[None]:
    """Run what other devices run."""
    modules = (model.lm, model.layers.mamba2)
    kept = [vars(module)["compiled"] for module in modules]
    try:
        for module in modules:
            vars(module)["compiled"] = lambda _: False
        yield
    finally:
        for module, function in zip(modules, kept, strict=True):
            vars(module)["compiled"] = function


@torch.inference_mode()
def time_steps(system: AdaptiveAttentionSystem, tokens: torch.Tensor, bought: Rates) -> float:
    """Seconds of reading tokens [B, WARM_UP + n] byte by byte, the warm-up not counted."""
    state = system.allocate_state(len(tokens), depth=bought.depth)
    rates = torch.full((len(tokens),), bought.decode, dtype=torch.float64)
    for column in tokens[:, :WARM_UP].unbind(1):
        system.step(column, state, rates)
    began = time.perf_counter()
    for column in tokens[:, WARM_UP:].unbind(1):
        system.step(column, state, rates)
    return time.perf_counter() - began


def time_prefill(system: AdaptiveAttentionSystem, tokens: torch.Tensor, bought: Rates) -> float:
    """Seconds of reading a prompt [1, L] of at most one block."""
    state = system.allocate_state(1, depth=bought.depth)
    began = time.perf_counter()
    system.prefill(tokens, state, bought.prefill)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
