"""What each term of the training loss does: tiny models that differ in one weight, trained on this project's files.

``python -m benchmarks.ablation`` prints JSON. All runs share the seed, the bytes and the held-out texts. ``reduced``
and ``uniform`` fire at a rate of 0.3, by the causal rule and at a stride. ``adapted`` starts from the embedded model,
whose density first forgets what it has learned: there the terms have something to work on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
ADAPTED = {name: TERMS[name] for name in ("all", "no compute", "no info")} | {"ten times info": {"lambda_info": 1.0}}
RATE = 0.3
DIVERGENCE = "divergence of reduced from full (nats per byte)"


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


def train(model: AdaptiveAttentionSystem, corpus: Corpus, config: TrainingConfig, name: str) -> AdaptiveAttentionSystem:
    """Train ``model`` on the same bytes as every other."""
    model.requires_grad_(True).train()
    optimizer = AdaptiveOptimizer(model, config)
    for step in tqdm(range(config.steps), desc=name, mininterval=5):
        tokens = corpus.batch(config.seed, step + 1, config.sequences, config.length)
        optimizer.optimize_step(tokens, sample_reduced(config, model.config, step), step)
    return model.requires_grad_(False).eval()


def new_model() -> AdaptiveAttentionSystem:
    """A small one, with the same weights every time."""
    torch.manual_seed(0)
    return AdaptiveAttentionSystem(SHAPE)


def forgetful_model() -> AdaptiveAttentionSystem:
    """The embedded one, with a density whose learned feature is as at first."""
    torch.manual_seed(0)
    model = load_checkpoint(EMBEDDED_CHECKPOINT)
    model.density.load_state_dict(AdaptiveAttentionSystem(model.config).density.state_dict())
    return model


def correlation(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Pearson's, 0 where one of them is constant."""
    deviation = one.std() * other.std()
    return 0.0 if deviation == 0.0 else float(((one - one.mean()) * (other - other.mean())).mean() / deviation)


@torch.no_grad()
def measure(model: AdaptiveAttentionSystem, tokens: Tensor) -> tuple[dict[str, float], Tensor]:
    """What the terms are about, on held-out texts [B, L + 1]; and the divergence of each [B]."""
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
    logits = {
        name: model(inputs, None if chosen is None else torch.from_numpy(chosen)).log_softmax(-1)
        for name, chosen in passes.items()
    }
    costs = {name: cross_entropy(values, targets) for name, values in logits.items()}
    divergence = F.kl_div(logits["reduced"], logits["full"], log_target=True, reduction="none").sum(-1).mean(1)
    lost = (costs["floor"] - costs["full"]).numpy() / math.log(2.0)
    runs = slice(0, inputs.shape[1] // 64 * 64)
    by_run = [value[:, runs].reshape(-1, 64).mean(1) for value in (density.numpy(), lost)]
    share = model.cost.fire() / model.cost.full_flops(1, 1)
    figures = {f"{name} (bits per byte)": float(cost.mean()) / math.log(2.0) for name, cost in costs.items()}
    figures |= {
        DIVERGENCE: float(divergence.mean()),
        "expected compute, RMS error over texts": share * float((expected - RATE).square().mean().sqrt()),
        "correlation of density and loss, per byte": correlation(density.numpy(), lost),
        "correlation of density and loss, per 64 bytes": correlation(*by_run),
    }
    return figures, divergence


def compare(
    terms: dict[str, dict[str, float]],
    start: Callable[[], AdaptiveAttentionSystem],
    corpora: tuple[Corpus, Tensor],
    config: TrainingConfig,
) -> dict[str, dict[str, float]]:
    """Figures of a model per choice of terms, and how its divergence differs from that with all of them, +- 95 %."""
    training, held_out = corpora
    results: dict[str, dict[str, float]] = {}
    divergences: dict[str, Tensor] = {}
    for name, weights in terms.items():
        model = train(start(), training, config.model_copy(update=weights), name)
        results[name], divergences[name] = measure(model, held_out)
        difference = divergences[name] - divergences["all"]
        half = 1.96 * float(difference.std()) / math.sqrt(len(difference))
        results[name] |= {"divergence over all terms'": float(difference.mean()), "its 95 % half-width": half}
    return results


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
        features, worth, stale, fires = parts[0]
        density = model.density.combine(features)
        regression = density_regression(model, density, worth, stale, fires)
        (0.1 * regression + weight * compute_error(model, density, RATE)).backward()
        optimizer.step()
    with torch.no_grad():
        features, worth, stale, fires = parts[1]
        density = model.density.combine(features)
        return {
            "expected compute, RMS error over texts": float(compute_error(model, density, RATE).sqrt()),
            "density regression (bits^2)": float(density_regression(model, density, worth, stale, fires)),
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
    shared = TrainingConfig(steps=arguments.steps, floor_share=0.2, uniform_share=0.1)
    small = shared.model_copy(update={"length": arguments.length})
    results = compare(TERMS, new_model, (training, tokens), small)
    longer = held_out.batch(3, 0, arguments.texts, 4 * arguments.length)
    gentle = {"sequences": 2, "length": 4 * arguments.length, "learning_rate": 5e-4, "warmup": 5, "cooldown": 0.5}
    adapting = shared.model_copy(update=gentle)
    adapted = compare(ADAPTED, forgetful_model, (training, longer), adapting)
    texts = training.batch(2, 0, arguments.texts, 4 * arguments.length), held_out.batch(2, 0, 16, 4 * arguments.length)
    fitted = {f"lambda_compute = {weight}": fit_density(*texts, weight) for weight in (0.0, 1.0, 10.0)}
    figures = {"rate": RATE, "trained": results, "adapted": adapted, "density alone": fitted}
    print(json.dumps(describe_machine() | figures, indent=2))


if __name__ == "__main__":
    main()
