"""``rheostat generate``: the engine in the terminal, without a server."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint, load_tokenizer
from model.device import choose_device
from service.engine.budget import NOT_ADAPTED, ComputeBudget, grant
from service.engine.engine import Engine
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import SamplingParams, Sequence
from service.metrics import Metrics


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command on ``parser``."""
    parser.add_argument("prompt", help="text to continue; - reads standard input")
    parser.add_argument("--budget", type=float, default=1.0, help="share of full compute, in (0, 1]")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most probable token")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--checkpoint", type=Path, default=EMBEDDED_CHECKPOINT, help="folder")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def run_generate(arguments: argparse.Namespace) -> int:
    """Run the command: text on standard output, figures on standard error. Returns the exit status."""
    _check(arguments)
    budget = ComputeBudget.exactly(arguments.budget)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    tokenizer = load_tokenizer(arguments.checkpoint)
    model = load_checkpoint(arguments.checkpoint, choose_device(arguments.device))
    metrics = Metrics(model.config.name)
    runner = ModelRunner(model)
    limits = Limits.for_states(runner.state_sizes, running=1, block_size=runner.block_size)
    engine = Engine(runner, Scheduler(limits, runner.state_sizes), metrics, time.monotonic)
    sequence = Sequence(
        tokenizer.encode(prompt),
        SamplingParams(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        ),
        grant(budget, model.cost),
        arrived=time.monotonic(),
        tokenizer=tokenizer,
    )
    engine.add([sequence])
    while not engine.idle:
        for output in engine.step():
            print(output.text, end="", flush=True)
    print()
    print(_figures(sequence), file=sys.stderr)
    if not model.config.adapted and arguments.budget < 1.0:
        print(f"{model.config.name}: {NOT_ADAPTED}", file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, not {arguments.max_tokens}")
    if not 0.0 <= arguments.temperature <= 2.0:
        raise ValueError(f"--temperature must be between 0 and 2, not {arguments.temperature}")
    if not 0.0 < arguments.top_p <= 1.0:
        raise ValueError(f"--top-p must be greater than 0 and at most 1, not {arguments.top_p}")


def _figures(sequence: Sequence) -> str:
    usage = sequence.usage()
    assert sequence.first_token is not None
    assert sequence.latest_token is not None
    decoding = sequence.latest_token - sequence.first_token
    pace = f", {(sequence.generated - 1) / decoding:.0f} {sequence.tokenizer.unit}s/s" if decoding > 0 else ""
    tiles = f"{usage.mean_tile_bytes:.1f} {sequence.tokenizer.unit}s per tile" if usage.mean_tile_bytes else "no tiles"
    floor = " (the floor)" if usage.reason == "floor" else ""
    return (
        f"[budget {usage.requested:g}, granted {usage.granted:.3g}{floor}, spent {usage.spent:.3f} = "
        f"{usage.spent_flops / 1e9:.2f} of {usage.full_flops / 1e9:.2f} GFLOP, {tiles}, "
        f"{len(sequence.prompt)} tokens read, {sequence.generated} generated{pace}]"
    )
