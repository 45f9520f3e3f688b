"""What a budget buys: compute, prefill time and decode time, each as a ratio to full budget on the same weights.

    python -m benchmarks.budget_latency --json

Every round runs all budgets one after the other through the engine, and each time is divided by that of full budget in
the same round; the report has the median over the rounds, so that a slow moment of the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import model as package
from benchmarks.machine import describe_machine
from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.device import choose_device, set_threads
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import ByteTokenizer
from service.engine.budget import ComputeBudget, grant
from service.engine.engine import Engine
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import Phase, SamplingParams, Sequence
from service.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Run:
    """One pass of a batch at one budget; seconds."""

    prefill: float
    decode: float
    flop_ratio: float


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="1,0.75,0.6,0.5,0.4,0.24", help="full budget is always measured")
    parser.add_argument("--prompt-bytes", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1024, help="generated per sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoding together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--checkpoint", type=Path, default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    model = load_checkpoint(arguments.checkpoint, choose_device(arguments.device))
    ByteTokenizer().require_vocabulary(model.config.name, model.config.vocab_size)
    budgets = sorted({1.0, *map(float, arguments.budgets.split(","))}, reverse=True)
    prompt = sample_text(arguments.prompt_bytes)
    for budget in budgets:  # compiles and allocates
        run(model, prompt[:600], 2, arguments.batch, budget)
    rounds = [
        {budget: run(model, prompt, arguments.tokens, arguments.batch, budget) for budget in budgets}
        for _ in range(arguments.rounds)
    ]
    rows = [summarise(budget, rounds) for budget in budgets]
    if arguments.json:
        setting = {name: getattr(arguments, name) for name in ("prompt_bytes", "tokens", "batch", "rounds")}
        print(json.dumps({**describe_machine(), **setting, "model": model.config.name, "budgets": rows}, indent=2))
        return
    print(f"{'budget':>8}{'FLOPs':>8}{'prefill':>9}{'decode':>8}   (ratios to full budget)")
    for row in rows:
        print(f"{row['budget']:8.2f}{row['flop_ratio']:8.3f}{row['prefill_ratio']:9.3f}{row['decode_ratio']:8.3f}")


def sample_text(size: int) -> str:
    """Text that the model was not trained on: this project's own source."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(package.__path__[0]).rglob("*.py")))
    text = text.encode("ascii", "ignore").decode("ascii")
    return (text * (size // len(text) + 1))[:size]


def run(model: AdaptiveAttentionSystem, prompt: str, tokens: int, batch: int, budget: float) -> Run:
    """Time one batch: until every prompt is read, and from there until every sequence has its tokens."""
    runner = ModelRunner(model)
    limits = Limits.for_states(runner.state_sizes, running=batch, block_size=runner.block_size)
    engine = Engine(runner, Scheduler(limits, runner.state_sizes), Metrics(model.config.name), time.perf_counter)
    given = grant(ComputeBudget.exactly(budget), model.cost)
    params = SamplingParams(max_tokens=tokens + batch, temperature=0.0, ignore_eos=True)
    sequences = [
        Sequence(ByteTokenizer().encode(prompt), params, given, arrived=time.perf_counter()) for _ in range(batch)
    ]
    decode = prefill = 0.0
    engine.add(sequences)
    while not engine.idle:
        reading = any(sequence.phase is Phase.PREFILL for sequence in sequences)
        began = time.perf_counter()
        engine.step()
        elapsed = time.perf_counter() - began
        prefill, decode = (prefill + elapsed, decode) if reading else (prefill, decode + elapsed)
    spent = sum(sequence.flops.total for sequence in sequences)
    return Run(prefill, decode, spent / sum(sequence.full_flops for sequence in sequences))


def summarise(budget: float, rounds: list[dict[float, Run]]) -> dict[str, float]:
    """Medians of one budget's ratios to full budget."""
    return {
        "budget": budget,
        "flop_ratio": rounds[0][budget].flop_ratio,
        "prefill_ratio": statistics.median(turn[budget].prefill / turn[1.0].prefill for turn in rounds),
        "decode_ratio": statistics.median(turn[budget].decode / turn[1.0].decode for turn in rounds),
    }


if __name__ == "__main__":
    main()
