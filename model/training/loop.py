"""The training loop: batches, steps, validation, checkpoints, resume."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import load_checkpoint, read_config, save_checkpoint
from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import ByteTokenizer
from model.training.calibration import calibrate
from model.training.config import TrainingConfig
from model.training.data import Corpus
from model.training.firing import sample_reduced
from model.training.loss import cross_entropy
from model.training.optimizer import AdaptiveOptimizer
from model.training.recipe import Recipe

STATE_FILE = "training.pt"
LOG_FILE = "log.jsonl"


class TrainingError(ValueError):
    """A run cannot start or continue as asked."""


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run reads and writes."""

    corpus: Path
    output: Path
    resume: bool = False
    initial: Path | None = None
    """A checkpoint to start from, with a fresh optimiser."""
    device: str = "cpu"
    minutes: float | None = None
    """Stop (and save) after this long; resume goes on with the same schedule."""


def train(run: Run, recipe: Recipe) -> AdaptiveAttentionSystem:
    """Train a model, or go on with a stopped run, and return it.

    A finished run is calibrated on the validation text, and its model counts as adapted to reduced budgets, unless it
    was trained at full resolution only. Writes a checkpoint, the state of the optimiser, and a log of one JSON object
    per validation, to ``run.output``.

    Raises:
        TrainingError: the output exists and ``resume`` is off, or the other way round, or the settings differ, or the
            initial checkpoint reads subwords.
        CorpusError, CheckpointError: the text or the initial checkpoint is unusable.
        FloatingPointError: the loss is not finite.
    """
    _check_output(run)
    config = recipe.training
    corpus = Corpus.open(run.corpus, "train", recipe.data.weights)
    held_out = Corpus.open(run.corpus, "valid", recipe.data.weights)
    torch.manual_seed(config.seed)
    if run.initial and read_config(run.initial).special_tokens is not None:
        raise TrainingError(f"training reads bytes, and the tokens of {run.initial} are subwords")
    model = load_checkpoint(run.initial) if run.initial else AdaptiveAttentionSystem(_shape(recipe))
    ByteTokenizer().require_vocabulary(model.config.name, model.config.vocab_size)
    model.requires_grad_(True).to(run.device).train()
    optimizer = AdaptiveOptimizer(model, config)
    earlier = _bytes_before(run)
    done = start = _restore(run, model, optimizer, config) if run.resume else 0
    validation = held_out.batch(0, 0, config.validation_sequences, config.length).to(run.device)
    began = time.monotonic()
    batch_bytes = config.sequences * config.length
    with tqdm(
        total=config.steps * batch_bytes, initial=start * batch_bytes, unit="B", unit_scale=True, mininterval=5
    ) as bar:
        for step in range(start, config.steps):
            tokens = corpus.batch(config.seed, step + 1, config.sequences, config.length).to(run.device)
            reduced = None if config.plain else sample_reduced(config, model.config, step)
            loss = optimizer.optimize_step(tokens, reduced, step)
            bar.update(batch_bytes)
            bar.set_postfix({name: f"{bits:.3f}" for name, bits in loss.bits.items()}, refresh=False)
            done = step + 1
            out_of_time = run.minutes is not None and time.monotonic() - began > 60.0 * run.minutes
            last = done == config.steps or out_of_time
            if done % config.validate_every == 0 or last:
                _log(run.output, {"step": done, "bytes": done * batch_bytes, **validate(model, validation)})
            if done % config.save_every == 0 or last:
                _save(run, model, optimizer, config, done, earlier)
            if out_of_time:
                break
    model.eval()
    if done == config.steps and not config.plain:
        calibrate(model, validation[:, :-1])
        model.config = model.config.model_copy(update={"adapted": True})
        _save(run, model, optimizer, config, done, earlier)
    return model


@torch.no_grad()
def validate(model: AdaptiveAttentionSystem, tokens: Tensor) -> dict[str, float]:
    """Bits per byte at full resolution and at the floor over tokens [B, L + 1]."""
    model.eval()
    sums = {"full": 0.0, "floor": 0.0}
    for row in tokens.split(4):
        inputs, targets = row[:, :-1], row[:, 1:]
        never = torch.zeros_like(inputs, dtype=torch.bool)
        for name, fires in (("full", None), ("floor", never)):
            sums[name] += cross_entropy(model(inputs, fires), targets).sum().item()
    model.train()
    count = tokens[:, 1:].numel() * math.log(2.0)
    return {f"validation_{name}": value / count for name, value in sums.items()}


def _shape(recipe: Recipe) -> ModelConfig:
    """Of a new model; one that is trained at full resolution only is not adapted to others."""
    return recipe.model.model_copy(update={"adapted": recipe.model.adapted and not recipe.training.plain})


def _check_output(run: Run) -> None:
    exists = (run.output / STATE_FILE).exists()
    if exists and not run.resume:
        raise TrainingError(f"{run.output} already holds a run: resume it, or choose another output")
    if run.resume and not exists:
        raise TrainingError(f"{run.output} holds no run to resume ({STATE_FILE} is missing)")


def _restore(run: Run, model: AdaptiveAttentionSystem, optimizer: AdaptiveOptimizer, config: TrainingConfig) -> int:
    """Load a stopped run into ``model`` and ``optimizer``; the number of steps done."""
    saved: dict[str, Any] = torch.load(run.output / STATE_FILE, map_location=run.device, weights_only=True)
    before = TrainingConfig.model_validate_json(saved["config"])
    if before.model_copy(update={"steps": config.steps}) != config:  # the end may move, nothing else
        raise TrainingError(f"the run in {run.output} has other settings: {saved['config']}")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def _bytes_before(run: Run) -> int:
    """Bytes that the initial checkpoint had been trained on, over all runs before this one."""
    if run.resume:
        return int(read_config(run.output).provenance.get("bytes_before", 0))
    return int(read_config(run.initial).provenance.get("bytes", 0)) if run.initial else 0


def _save(
    run: Run,
    model: AdaptiveAttentionSystem,
    optimizer: AdaptiveOptimizer,
    config: TrainingConfig,
    step: int,
    earlier: int,
) -> None:
    """Save what a resumed run needs, then the checkpoint that others read."""
    run.output.mkdir(parents=True, exist_ok=True)
    partial = run.output / f"{STATE_FILE}.partial"
    content = {
        "step": step,
        "config": config.model_dump_json(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, partial)
    partial.replace(run.output / STATE_FILE)
    trained = earlier + step * config.sequences * config.length
    provenance = {"steps": step, "bytes_before": earlier, "bytes": trained, "seed": config.seed}
    save_checkpoint(model, run.output, provenance)


def _log(folder: Path, record: dict[str, float | int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
