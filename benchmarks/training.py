"""How long a training step's loss and gradient take at full resolution, as ratios to what a user would run instead.

    python -m benchmarks.training --threads 1 --json

One model with the same weights on every side: transformers' Mamba-2, this project's tensor operations, which other
devices run, its fused loops, and these with bfloat16 products where the CPU has units for them. Every round runs each
side once, on the same random bytes; the report has the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

import model.layers.mamba2
from benchmarks.machine import describe_machine
from benchmarks.parity import SPEED, pair
from model.device import set_threads
from model.ops.products import multiplies_bf16, products
from model.training.loss import cross_entropy


def seconds(network: nn.Module, logits: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """Of the loss of tokens [B, L + 1] and its gradient."""
    network.zero_grad(set_to_none=True)
    start = time.perf_counter()
    cross_entropy(logits(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
    return time.perf_counter() - start


def compare(sequences: int, length: int, rounds: int) -> dict[str, object]:
    """Seconds of each side per round, and the median ratios to the fused loops."""
    ours, theirs = pair(SPEED)
    for network in (ours, theirs):
        network.requires_grad_(True).train()
    tokens = torch.randint(0, 257, (sequences, length + 1))
    fused = partial(seconds, ours, ours, tokens)

    def tensor_operations() -> float:
        with mock.patch.object(model.layers.mamba2, "fused", return_value=False):
            return fused()

    def low_products() -> float:
        with products("medium"):
            return fused()

    sides: dict[str, Callable[[], float]] = {
        "transformers": partial(seconds, theirs, lambda inputs: theirs(inputs, use_cache=False).logits, tokens),
        "tensor operations": tensor_operations,
        "fused": fused,
    }
    if multiplies_bf16():
        sides["fused, bf16 products"] = low_products
    for side in sides.values():
        side()  # compiles and allocates
    times = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
    return {
        "bytes": sequences * length,
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "time_ratios": {name: statistics.median(row[name] / row["fused"] for row in times) for name in sides},
        "rounds": times,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="bytes of a sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    report = compare(arguments.sequences, arguments.length, arguments.rounds)
    if arguments.json:
        print(json.dumps(describe_machine() | report, indent=2))
        return
    ratios = report["time_ratios"]
    assert isinstance(ratios, dict)
    for name, ratio in ratios.items():
        print(f"{name:<24}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
