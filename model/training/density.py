"""``rheostat fit-density``: the density alone, fitted to what a trained model's trunk is worth.

Reading a megabyte takes minutes, training on it for as long as the rest of the model needs takes hours: so another
shape of the density, or a checkpoint that was trained without it, needs no new training.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model.adaptive.density import InformationDensityAnalyzer
from model.checkpoint import load_checkpoint, read_config, save_checkpoint
from model.config import ModelConfig
from model.device import choose_device, set_threads
from model.lm import AdaptiveAttentionSystem
from model.training.calibration import calibrate
from model.training.cli import sampling_weights
from model.training.config import TrainingConfig
from model.training.data import Corpus
from model.training.loss import clamped_bits, cross_entropy, floor_logits, mean_ahead

READ = 16
"""Sequences read at once."""
POSITIONS = 2048
"""Positions of one step of the fit."""
EPOCHS = 4
RATE = 3e-3
"""Learning rate at the first step; it falls in a straight line."""


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command on ``parser``."""
    parser.add_argument("corpus", type=Path, help="folder of <domain>.<train|valid>.txt[.xz], documents end in NUL")
    parser.add_argument("--initial", type=Path, required=True, help="checkpoint whose density is fitted anew")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument(
        "--weights", type=sampling_weights, help="sampling weights such as code=0.55,prose=0.45; by size"
    )
    parser.add_argument("--units", type=int, default=64, help="hidden units of the learned feature")
    parser.add_argument(
        "--measured", action=argparse.BooleanOptionalAction, help="also read the four measured features; as it was"
    )
    parser.add_argument("--inertia", type=float, help="what keeps stretches of fires together; as it was")
    parser.add_argument(
        "--restart-bytes", type=float, help="what a plan counts as lost after a gap, in bytes; as it was"
    )
    parser.add_argument("--window", type=int, help="bytes over which the density is averaged; as it was")
    parser.add_argument(
        "--foresight",
        type=int,
        help="bytes ahead over which the trunk's worth is averaged; 64, or 1 where its states read between fires",
    )
    parser.add_argument("--sequences", type=int, default=512, help="sequences read")
    parser.add_argument("--length", type=int, default=2048, help="bytes of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads")


def run_fit(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    set_threads(arguments.threads)
    config = read_config(arguments.initial)
    if arguments.foresight is None:
        arguments.foresight = 1 if config.model.propagation_rank else 64
    # Of a training run, whose bounds they have.
    settings = {name: getattr(arguments, name) for name in ("foresight", "sequences", "length", "seed")}
    TrainingConfig.model_validate(settings)
    source = load_checkpoint(arguments.initial, choose_device(arguments.device))
    change = {"density_hidden": arguments.units}
    optional = {
        "density_measured": arguments.measured,
        "inertia": arguments.inertia,
        "restart_bytes": arguments.restart_bytes,
        "window_size": arguments.window,
    }
    change |= {name: value for name, value in optional.items() if value is not None}
    torch.manual_seed(arguments.seed)
    model = with_density(source, ModelConfig.model_validate(source.config.model_dump() | change))
    weights = arguments.weights or None
    text, held_out = (Corpus.open(arguments.corpus, split, weights) for split in ("train", "valid"))
    count = max(1, arguments.sequences // READ)
    evidence = []
    for step in tqdm(range(count), desc="reading", unit="batch"):
        tokens = text.batch(arguments.seed, step, READ, arguments.length).to(model.device)
        evidence.append(read_evidence(model, tokens, arguments.foresight))
    for (analyzer, _), parts in zip(model.placements(), zip(*evidence, strict=True), strict=True):
        fit_density(analyzer, parts)
    calibrate(model, held_out.batch(0, 0, READ, arguments.length).to(model.device))
    read = {"density_bytes": count * READ * arguments.length, "density_seed": arguments.seed}
    save_checkpoint(model.requires_grad_(False), arguments.output, config.provenance | read, config.special_tokens)
    return 0


def with_density(source: AdaptiveAttentionSystem, shape: ModelConfig) -> AdaptiveAttentionSystem:
    """A model of another density, but otherwise the same shape, with the weights of ``source``."""
    model = AdaptiveAttentionSystem(shape).to(source.device).eval().requires_grad_(False)
    given, own = source.state_dict(), model.state_dict()
    model.load_state_dict(
        {name: given[name] if _same(given.get(name), value) else value for name, value in own.items()}
    )
    return model


def _same(given: Tensor | None, own: Tensor) -> bool:
    return given is not None and given.shape == own.shape


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the density of a stage reads, and what it should say, at n positions."""

    features: Tensor
    """[n, 4] fp32, those that are measured; 0 where none is."""
    inputs: Tensor
    """[n, D] fp16, to spare memory: what the stage is given."""
    worth: Tensor
    """[n] bits that the stage saves where it runs everywhere, a mean over the bytes ahead."""


@torch.no_grad()
def read_evidence(model: AdaptiveAttentionSystem, tokens: Tensor, foresight: int) -> list[Evidence]:
    """Evidence of texts [B, L + 1] for each stage of the trunk."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    encoded = model.encode(inputs, model.allocate_state(len(inputs)).encoder)
    features, _ = model.features(encoded, model.density.zero_state(len(inputs), tokens.device))
    outputs, entrances = model.combine_everywhere(encoded.hidden)
    costs = [cross_entropy(floor_logits(model, encoded), targets)]
    costs += [cross_entropy(model.head(output), targets) for output in outputs]
    evidence = []
    for entrance, (below, here) in zip(entrances, pairwise(costs), strict=True):
        worth = clamped_bits(mean_ahead(below - here, foresight))
        given = entrance.inputs.flatten(0, 1).half()
        evidence.append(Evidence(features[..., :-1].flatten(0, 1), given, worth.flatten()))
    return evidence


def fit_density(density: InformationDensityAnalyzer, evidence: Sequence[Evidence]) -> float:
    """Fit a density's weights in place to the least squared error; the mean of the last epoch, in bits²."""
    features = torch.cat([part.features for part in evidence])
    inputs = torch.cat([part.inputs for part in evidence])
    worth = torch.cat([part.worth for part in evidence])
    density.mean.copy_(features.mean(0))
    density.std.copy_(features.std(0).clamp_min(1e-3))
    density.requires_grad_(True)
    torch.nn.init.normal_(density.outer, std=0.1)  # from zero the first layer would learn nothing at first
    optimizer = torch.optim.AdamW(density.parameters(), lr=RATE, weight_decay=0.01)
    steps, step, error = EPOCHS * math.ceil(len(worth) / POSITIONS), 0, 0.0
    for _ in tqdm(range(EPOCHS), desc="fitting", unit="epoch"):
        error = 0.0
        for rows in torch.randperm(len(worth)).split(POSITIONS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * max(0.02, 1.0 - step / steps)
            predicted = density.combine(density.learned(features[rows], inputs[rows].float()))
            loss = (predicted - worth[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            error += loss.item() * len(rows) / len(worth)
    return error
