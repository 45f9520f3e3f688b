"""Where keeping states of prompts pays: time to the first token and answers per second, with and without a cache.

    python -m benchmarks.prefix_cache [--requests N] [--json] [--threads N]

Every request is a beginning that all share, a question of its own and 16 tokens of answer, at full budget and at one
half, eight at a time, in the engine without HTTP. Arms take turns; a ratio is the median over the turns, with the cache
over without it. A beginning of 0 bytes shows what the cache costs where nothing is shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence as Items
from pathlib import Path

import model as package
from benchmarks.machine import describe_machine
from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.device import core_count
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import ByteTokenizer
from service.engine.budget import ComputeBudget, grant
from service.engine.engine import Engine
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import SamplingParams, Sequence
from service.metrics import Metrics

SHARED = (0, 512, 2048, 8192)
BUDGETS = (1.0, 0.5)
CACHE_BYTES = 1 << 28
TOGETHER, QUESTION, TURNS = 8, 200, 5


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16, help="of one turn of one arm")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=core_count())
    arguments = parser.parse_args()
    system = load_checkpoint(EMBEDDED_CHECKPOINT)
    rows = [measure(system, shared, budget, arguments) for budget in BUDGETS for shared in SHARED]
    if arguments.json:
        print(json.dumps(describe_machine() | {"threads": arguments.threads, "rows": rows}, indent=2))
        return
    print(f"{'budget':>6}{'shared':>8}{'first token':>13}{'answers/s':>11}")
    for row in rows:
        print(f"{row['budget']:6}{row['shared_bytes']:8}{row['first_token_ratio']:13.2f}{row['rate_ratio']:11.2f}")


def measure(
    system: AdaptiveAttentionSystem, shared: int, budget: float, arguments: argparse.Namespace
) -> dict[str, float]:
    """Ratios for one length of the beginning and one budget."""
    first, rate = [], []
    for turn in range(TURNS):
        prompts = make_prompts(shared, arguments.requests, turn)
        plain, cached = (run(system, prompts, budget, size, arguments.threads) for size in (0, CACHE_BYTES))
        first.append(cached[0] / plain[0])
        rate.append(cached[1] / plain[1])
    medians = {"first_token_ratio": statistics.median(first), "rate_ratio": statistics.median(rate)}
    return {"budget": budget, "shared_bytes": shared} | medians


def make_prompts(shared: int, count: int, turn: int) -> list[str]:
    """Prompts of this package's source, which the model was not trained on; those of another turn share nothing."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(package.__path__[0]).rglob("*.py")))
    text = text.encode("ascii", "ignore").decode("ascii")
    begin = turn * 10_000
    questions = [text[at : at + QUESTION] for at in range(100_000 + begin, 100_000 + begin + count * 300, 300)]
    return [text[begin : begin + shared] + question for question in questions]


def run(
    system: AdaptiveAttentionSystem, prompts: Items[str], budget: float, cache_bytes: int, threads: int
) -> tuple[float, float]:
    """Mean seconds to the first token, and answers per second."""
    runner = ModelRunner(system, cache_bytes, threads)
    limits = Limits.for_states(runner.state_sizes, running=TOGETHER, block_size=runner.block_size, blocks=threads)
    metrics = Metrics(system.config.name)
    engine = Engine(runner, Scheduler(limits, runner.state_sizes), metrics, time.perf_counter)
    given = grant(ComputeBudget.exactly(budget), system.cost)
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    waiting = list(prompts)
    sequences: list[Sequence] = []

    def send() -> None:
        tokens = ByteTokenizer().encode(waiting.pop(0))
        sequences.append(Sequence(tokens, params, given, arrived=time.perf_counter()))
        engine.add(sequences[-1:])

    began = time.perf_counter()
    while len(sequences) < TOGETHER:
        send()
    while not engine.idle:
        for output in engine.step():
            if output.finish is not None and waiting:
                send()
    seconds = time.perf_counter() - began
    runner.close()
    waits = [s.first_token - s.arrived for s in sequences if s.first_token is not None]
    return statistics.fmean(waits), len(prompts) / seconds


if __name__ == "__main__":
    main()
