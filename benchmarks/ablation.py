"""What each term of the training loss does: tiny models that differ in one weight, trained on this project's files.

``python -m benchmarks.ablation`` prints JSON. All runs share the seed, the bytes and the held-out texts. ``reduced``
and ``uniform`` fire at a rate of 0.3, by the causal rule and at a stride.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import describe_machine
from model.checkpoint import EMBEDDED_CHECKPOINT, load_checkpoint
from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.training.config import TrainingConfig
from model.training.data import SEPARATOR, Corpus, Domain
from model.training.expected import expected_rates
from model.training.firing import START, fit_log_threshold, sample_reduced
from model.training.loss import compute_error, cross_entropy, density_regression
from model.training.optimizer import AdaptiveOptimizer

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ModelConfig(
    name="ablation", d_model=48, d_trunk=64, trunk_layers=2, headdim=16, d_state=16, d_state_levels=(8, 16),
    chunk_size=32, density_window=16,
)  # fmt: skip
TERMS = {
    "all": {},
    "no compute": {"lambda_compute": 0.0},
    "ten times compute": {"lambda_compute": 10.0},
    "no info": {"lambda_info": 0.0},
    "no reduced task": {"full_weight": 1.0},
}
RATE = 0.3


def read_corpora() -> tuple[Corpus, Corpus]:
    """Sources and documents of the project; every fifth file is held out."""
    splits: tuple[list[Domain], list[Domain]] = ([], [])
    for name, pattern in (("code", "*.py"), ("prose", "*.md")):
        paths = [path for folder in ("model", "service", "tests", "docs") for path in (ROOT / folder).rglob(pattern)]
        texts = [text for path in sorted(paths) if (text := path.read_bytes())]
        for split, chosen in zip(splits, ([t for i, t in enumerate(texts) if i % 5], texts[::5]), strict=True):
            starts = np.concatenate([[0], np.cumsum([len(text) + 1 for text in chosen])[:-1]]).astype(np.int64)
            joined = np.frombuffer(b"\0".join(chosen) + bytes([SEPARATOR]), np.uint8)
            split.append(Domain(name, joined, starts))
    weights = {"code": 0.5, "prose": 0.5}
    return Corpus(splits[0], weights), Corpus(splits[1], weights)


def train(corpus: Corpus, config: TrainingConfig, name: str) -> AdaptiveAttentionSystem:
    """One small model, from the same initial weights as every other."""
    torch.manual_seed(config.seed)
    model = AdaptiveAttentionSystem(SHAPE).train()
    optimizer = AdaptiveOptimizer(model, config)
    for step in tqdm(range(config.steps), desc=name, mininterval=5):
        tokens = corpus.batch(config.seed, step + 1, config.sequences, config.length)
        optimizer.optimize_step(tokens, sample_reduced(config, SHAPE, step), step)
    return model.eval()


def correlation(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Pearson's, 0 where one of them is constant."""
    deviation = one.std() * other.std()
    return 0.0 if deviation == 0.0 else float(((one - one.mean()) * (other - other.mean())).mean() / deviation)


@torch.no_grad()
def measure(model: AdaptiveAttentionSystem, tokens: Tensor) -> dict[str, float]:
    """What the terms are about, on held-out texts [B, L + 1]."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    encoded = model.encode(inputs, model.allocate_state(len(inputs)).encoder)
    features, _ = model.features(encoded, model.allocate_state(len(inputs)).density)
    density = model.density.combine(features)
    smoothed = list(model.analyse(inputs).numpy())
    model.tiles.update_spread(np.stack(smoothed), 1.0)
    threshold = fit_log_threshold(model.tiles, smoothed, RATE)
    fires = np.stack([model.tiles.online(row, RATE, START, threshold) for row in smoothed]).astype(bool)
    even = np.stack([model.tiles.evenly(inputs.shape[1], RATE, START) for _ in smoothed]).astype(bool)
    expected = expected_rates(density, RATE, model.density.window_size, model.tiles.spread)
    passes = {"full": None, "reduced": fires, "uniform": even, "floor": np.zeros_like(fires)}
    costs = {
        name: cross_entropy(model(inputs, None if chosen is None else torch.from_numpy(chosen)), targets)
        for name, chosen in passes.items()
    }
    lost = (costs["floor"] - costs["full"]).numpy() / math.log(2.0)
    runs = slice(0, inputs.shape[1] // 64 * 64)
    by_run = [value[:, runs].reshape(-1, 64).mean(1) for value in (density.numpy(), lost)]
    share = model.cost.unit.trunk / model.cost.full_flops(1, 1)
    figures = {f"{name} (bits per byte)": float(cost.mean()) / math.log(2.0) for name, cost in costs.items()}
    return figures | {
        "expected compute, RMS error over texts": share * float((expected - RATE).square().mean().sqrt()),
        "correlation of density and loss, per byte": correlation(density.numpy(), lost),
        "correlation of density and loss, per 64 bytes": correlation(*by_run),
    }


def fit_density(training: Tensor, held_out: Tensor, weight: float) -> dict[str, float]:
    """The embedded model's density alone, fitted anew with the information and the compute term, to their end.

    Args:
        training, held_out: [B, L + 1]. weight: of the compute term, beside a regression that has weight 0.1.
    """
    model = load_checkpoint(EMBEDDED_CHECKPOINT).requires_grad_(False)
    parts = [_stale_cost(model, tokens) for tokens in (training, held_out)]
    model.density.requires_grad_(True)
    optimizer = torch.optim.Adam(model.density.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        features, *measured = parts[0]
        density = model.density.combine(features)
        loss = 0.1 * density_regression(model, density, *measured) + weight * compute_error(model, density, RATE)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        features, *measured = parts[1]
        density = model.density.combine(features)
        return {
            "expected compute, RMS error over texts": float(compute_error(model, density, RATE).sqrt()),
            "density regression (bits^2)": float(density_regression(model, density, *measured)),
        }


@torch.no_grad()
def _stale_cost(model: AdaptiveAttentionSystem, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [B, L, 5], nats lost by the floor and by a reduced pass [B, L], and its fires [B, L]."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    state = model.allocate_state(len(inputs))
    encoded = model.encode(inputs, state.encoder)
    features, _ = model.features(encoded, state.density)
    rows = model.analyse(inputs).numpy()
    fires = torch.from_numpy(np.stack([model.tiles.online(row, RATE, START) for row in rows]).astype(bool))
    full = cross_entropy(model(inputs), targets)
    floor = cross_entropy(model(inputs, torch.zeros_like(fires)), targets)
    return features, floor - full, cross_entropy(model(inputs, fires), targets) - full, fires


def main() -> None:
    """Run the ablation and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    training, held_out = read_corpora()
    tokens = held_out.batch(1, 0, arguments.texts, arguments.length)
    results = {}
    for name, weights in TERMS.items():
        config = TrainingConfig(
            steps=arguments.steps, sequences=4, length=arguments.length, floor_share=0.2, uniform_share=0.1
        ).model_copy(update=weights)
        results[name] = measure(train(training, config, name), tokens)
    texts = training.batch(2, 0, arguments.texts, 4 * arguments.length), held_out.batch(2, 0, 16, 4 * arguments.length)
    fitted = {f"lambda_compute = {weight}": fit_density(*texts, weight) for weight in (0.0, 1.0, 10.0)}
    print(json.dumps(describe_machine() | {"rate": RATE, "trained": results, "density alone": fitted}, indent=2))


if __name__ == "__main__":
    main()
