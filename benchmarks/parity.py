"""Every component against its reference; and speed and memory side by side with transformers' Mamba-2.

    python -m benchmarks.parity [--speed] [--json]

Without ``--speed``: a table of components, references, maximal errors and cases; the exit status is 1 if an error is
over its bound. With ``--speed``: a plain Mamba-2 of six layers and width 256; both models hold the same weights, rounds
alternate between them, and the ratios are medians over the rounds. A step is measured with the weights as drawn, in
fp32, and rounded to what bf16 has, as many models are published; both models compute in fp32 with either.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2ForCausalLM

from benchmarks.machine import describe_machine
from benchmarks.references import autograd_gradient, brute_force, dense_rows, make_trace, states
from model.adaptive.density import state_gradient
from model.adaptive.router import CrossScaleRouter
from model.convert import SourceConfig, convert_config, convert_weights, round_matrices
from model.device import set_threads
from model.layers.mamba2 import VariableStateSpaceModel
from model.lm import AdaptiveAttentionSystem
from model.ops.ssd import ssd_scan, ssd_step
from model.ops.tiling import plan_block, plan_sizes, staleness_table

SPEED = {"hidden_size": 256, "num_hidden_layers": 6, "num_heads": 8, "head_dim": 64, "state_size": 64, "chunk_size": 64}
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16, "state_size": 16, "chunk_size": 16}
SHAPES: list[dict[str, Any]] = [
    {},
    {"chunk_size": 8},
    {"expand": 4, "head_dim": 32},
    {"num_heads": 8, "head_dim": 8, "state_size": 24, "conv_kernel": 3},
    {"tie_word_embeddings": True, "num_hidden_layers": 7},
    {"vocab_size": 500, "layer_norm_epsilon": 1e-3, "use_conv_bias": False},
    {"time_step_limit": (0.02, 0.06)},
]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    component: str
    reference: str
    error: float
    bound: float
    cases: int


def pair(changes: dict[str, Any], seed: int = 0) -> tuple[AdaptiveAttentionSystem, nn.Module]:
    """Our model and transformers', of one shape, with the same random weights at which nothing is at rest."""
    torch.manual_seed(seed)
    keys = {"model_type": "mamba2", "vocab_size": 257, "n_groups": 1} | SMALL | changes
    source = SourceConfig.model_validate(keys)
    theirs: nn.Module = Mamba2ForCausalLM(Mamba2Config(**source.model_dump(exclude={"model_type"})))
    theirs.eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        if name.endswith(("conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "norm_f.weight")):
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif name.endswith("embeddings.weight"):
            parameter.mul_(8)
    config = convert_config(source, "parity")
    return convert_weights(config, theirs.state_dict(), conv_bias=source.use_conv_bias), theirs


def steps(model: AdaptiveAttentionSystem, tokens: Tensor) -> Tensor:
    """Logits [B, L, V] of reading tokens one by one at full budget."""
    state, rates = model.allocate_state(len(tokens)), torch.ones(len(tokens), dtype=torch.float64)
    return torch.stack([model.step(column, state, rates).logits for column in tokens.unbind(1)], 1)


def pieces(model: AdaptiveAttentionSystem, tokens: Tensor) -> Tensor:
    """Logits [L, V] of reading one prompt block by block at full budget."""
    state = model.allocate_state(1)
    blocks = [model.prefill(part, state, 1.0, score=True).logits for part in tokens.split(model.config.block_size, 1)]
    return torch.cat([block for block in blocks if block is not None])


def logits_rows() -> Iterator[Row]:
    """Whole models against transformers, for every shape and for lengths beside and on the chunk's borders."""
    errors: dict[str, list[float]] = {"forward": [], "prefill in blocks": [], "step": []}
    for seed, changes in enumerate(SHAPES):
        ours, theirs = pair(changes, seed)
        for length in (1, 15, 16, 17, 77, 600):
            tokens = torch.randint(0, ours.config.vocab_size, (1, length))
            expected = theirs(tokens).logits
            errors["forward"].append(_gap(ours(tokens), expected))
            errors["prefill in blocks"].append(_gap(pieces(ours, tokens), expected[0]))
            errors["step"].append(_gap(steps(ours, tokens), expected))
    for part, values in errors.items():
        yield Row(f"full budget, {part}", "transformers Mamba2ForCausalLM", max(values), 1e-4, len(values))


def scan_row() -> Row:
    """The chunked scan against the recurrence, one position at a time, in float64."""
    errors = []
    for chunk in (1, 8, 16, 64):
        for length in (1, 16, 33, 100):
            x, dt = torch.randn(2, length, 3, 4).double(), torch.rand(2, length, 3).double()
            B, C, A = *torch.randn(2, 2, length, 5).double(), -torch.rand(3).double() * 8
            state = torch.randn(2, 3, 4, 5).double()
            scan = ssd_scan(x, dt, A, B, C, initial_state=state, chunk_size=chunk)
            for t in range(length):
                y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
                errors.append(_gap(scan.y[:, t], y))
            errors.append(_gap(scan.final_state, state))
    return Row("ssd_scan", "recurrence, float64", max(errors), 1e-9, len(errors))


def nested_row() -> Row:
    """A block at a smaller state against a block built with that size from the same prefix."""
    errors = []
    ours, _ = pair({})
    mixer = ours.get_submodule("trunk.0.mixer")
    assert isinstance(mixer, VariableStateSpaceModel)
    mixer.level_scale.fill_(1.4)
    for size in mixer.levels[:-1]:
        twin = mixer.resized(size)
        for length in (1, 16, 77):
            hidden, full = torch.randn(2, length, mixer.width), mixer.zero_state(2, torch.device("cpu"))
            output, _, _ = mixer(hidden, mixer.resize_state_space(full, size))
            expected, _, _ = twin(hidden, twin.zero_state(2, torch.device("cpu")))
            errors.append(_gap(output, expected))
    return Row("resize_state_space", "block built at that size", max(errors), 1e-5, len(errors))


def density_rows() -> Iterator[Row]:
    """Features of the density in float64: the state gradient, entropy and distance of attention."""
    trace = make_trace()
    found, differences = state_gradient(trace, 8), states(trace).diff(dim=1).flatten(2).norm(dim=-1)
    yield Row("state gradient", "materialised states", _gap(found, differences.log1p()), 1e-9, found.numel())
    with torch.inference_mode(False):
        expected = autograd_gradient(make_trace())
    yield Row("state gradient", "autograd by position", _gap(found, expected.log1p()), 1e-9, found.numel())
    ours, _ = pair({})
    ours.double()
    state = ours.allocate_state(1).map(lambda value: value.double() if value.is_floating_point() else value)
    encoded = ours.encode(torch.randint(0, 257, (1, 70)), state.encoder)
    features, _ = ours.features(encoded, state.density)
    assert encoded.trace is not None, "the shape measures features"
    rows = [torch.stack(dense_rows(encoded.trace, t, ours.config.density_window)) for t in range(70)]
    gap = _gap(features[0, :, 1:3], torch.stack(rows))
    yield Row("attention entropy and distance", "dense attention", gap, 1e-9, 2 * len(rows))


def tiling_row() -> Row:
    """The dynamic programmes, of an interval and of a set of sizes, against every tiling there is."""
    random, errors = np.random.default_rng(0), []
    for _ in range(40):
        density, table = (
            random.exponential(size=int(random.integers(1, 10))),
            staleness_table(random.uniform(0.3, 9), 64),
        )
        price, entry, carry = random.uniform(0.01, 6), random.uniform(0, 4), int(random.integers(0, 9))
        sizes = np.sort(random.choice(np.arange(1, 9), int(random.integers(1, 6)), replace=False))
        least, most = int(sizes[0]), int(sizes[-1])
        for cost, allowed in (
            (plan_sizes(density, table, price, entry, carry, sizes)[2], sizes.tolist()),
            (plan_block(density, table, price, entry, carry, least, most)[2], range(least, most + 1)),
        ):
            errors.append(abs(cost - brute_force(density, table, price, entry, carry, allowed)))
    return Row("TileManager, cost of plans", "brute force", max(errors), 1e-9, len(errors))


def router_row() -> Row:
    """At initialisation: down keeps the prefix, up adds zeros, a fresh update passes unchanged. All exact."""
    ours, _ = pair({})
    router, config, errors = CrossScaleRouter(ours.config), ours.config, []
    for small in config.d_state_levels:
        for large in config.d_state_levels:
            state = torch.randn(2, 3, 4, large)
            kept = torch.nn.functional.pad(state, (0, small - large))
            errors.append(_gap(router.route_states(state, torch.full((2,), small)), kept))
    held = torch.randn(4, config.d_model)
    errors.append(_gap(router.fade(held, torch.zeros(4, dtype=torch.int64)), held))
    return Row("CrossScaleRouter, initial", "identity", max(errors), 0.0, len(errors))


def _gap(ours: Tensor, expected: Tensor) -> float:
    """Greatest difference; a NaN counts as infinite."""
    return float((ours - expected).abs().nan_to_num(nan=float("inf")).max())


def time_sides(length: int, generated: int, rounds: int, *, bf16: bool = False) -> dict[str, Any]:
    """Seconds of prefill and of a step per round, and the median ratios (transformers' time / ours).

    ``bf16``: both hold weights that bf16 has.
    """
    ours, theirs = pair(SPEED)
    if bf16:
        round_matrices(ours)
        round_matrices(theirs)
    tokens = torch.randint(0, 257, (1, length))
    sides: dict[str, Callable[[], tuple[float, float]]] = {
        "rheostat": lambda: run_ours(ours, tokens, generated),
        "transformers": lambda: run_theirs(theirs, tokens, generated),
    }
    for run in sides.values():
        run()  # compiles and allocates
    times = [{name: run() for name, run in sides.items()} for _ in range(rounds)]
    ratios = [[row["transformers"][part] / row["rheostat"][part] for row in times] for part in (0, 1)]
    return {
        "bytes": length,
        "parameters": sum(parameter.numel() for parameter in theirs.parameters()),
        "prefill_ratio": statistics.median(ratios[0]),
        "step_ratio": statistics.median(ratios[1]),
        "rounds": times,
    }


@torch.inference_mode()
def run_ours(model: AdaptiveAttentionSystem, tokens: Tensor, generated: int) -> tuple[float, float]:
    """Seconds of reading ``tokens`` block by block as the server does, and of one step after that."""
    state, rates = model.allocate_state(1), torch.ones(1, dtype=torch.float64)
    start = time.perf_counter()
    for part in tokens.split(model.config.block_size, 1):
        model.prefill(part, state, 1.0)
    read = time.perf_counter()
    for token in tokens[:, :generated].unbind(1):
        model.step(token, state, rates)
    return read - start, (time.perf_counter() - read) / max(generated, 1)


@torch.inference_mode()
def run_theirs(model: nn.Module, tokens: Tensor, generated: int) -> tuple[float, float]:
    """The same by transformers, whose head runs at the last position only, with its cache."""
    start = time.perf_counter()
    cache = model(tokens, use_cache=True, logits_to_keep=1).cache_params
    read = time.perf_counter()
    for token in tokens[:, :generated].unbind(1):
        model(token.unsqueeze(1), cache_params=cache, use_cache=True)
    return read - start, (time.perf_counter() - read) / max(generated, 1)


def peak_memory(side: str, length: int, threads: int | None) -> int:
    """Bytes by which reading ``length`` bytes raises the peak of a process of its own that has loaded both models."""
    command = [sys.executable, "-m", "benchmarks.parity", "--memory-of", side, "--length", str(length)]
    command += [] if threads is None else ["--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure_memory(side: str, length: int) -> int:
    ours, theirs = pair(SPEED)
    tokens = torch.randint(0, 257, (1, length))
    before = _peak()
    if side == "rheostat":
        run_ours(ours, tokens, 0)
    else:
        run_theirs(theirs, tokens, 0)
    return _peak() - before


def _peak() -> int:
    """Greatest resident bytes of this program; ``ru_maxrss`` would count its parent's too, which exec keeps."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


def main() -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="time and memory instead of errors")
    parser.add_argument("--length", type=int, default=8192, help="bytes of prompt")
    parser.add_argument("--tokens", type=int, default=64, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=["rheostat", "transformers"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    if arguments.memory_of:
        print(_measure_memory(arguments.memory_of, arguments.length))
        return 0
    if arguments.speed:
        report = time_sides(arguments.length, arguments.tokens, arguments.rounds)
        report["bf16"] = time_sides(min(arguments.length, 512), arguments.tokens, arguments.rounds, bf16=True)
        peaks = {side: peak_memory(side, arguments.length, arguments.threads) for side in ("rheostat", "transformers")}
        report["peak_bytes"] = peaks
        if arguments.json:
            print(json.dumps(describe_machine() | report, indent=2))
        else:
            print(f"prefill of {report['bytes']} bytes: {report['prefill_ratio']:.2f} times as fast as transformers")
            print(f"one-stream step, weights of fp32: {report['step_ratio']:.2f} times as fast as transformers")
            print(f"one-stream step, weights of bf16: {report['bf16']['step_ratio']:.2f} times as fast as transformers")
            print(
                "peak memory of prefill: " + ", ".join(f"{side} {size / 2**20:.1f} MiB" for side, size in peaks.items())
            )
        return 0
    with torch.inference_mode():
        rows = [*logits_rows(), scan_row(), nested_row(), *density_rows(), tiling_row(), router_row()]
    if arguments.json:
        print(json.dumps(describe_machine() | {"rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(f"{'component':<32}{'reference':<32}{'error':>9}{'bound':>9}{'cases':>7}")
        for row in rows:
            print(f"{row.component:<32}{row.reference:<32}{row.error:>9.1e}{row.bound:>9.0e}{row.cases:>7}")
    return int(any(row.error > row.bound for row in rows))


if __name__ == "__main__":
    sys.exit(main())
