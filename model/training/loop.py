"""The training loop: batches, steps, validation, log, saved states, resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import torch
from tqdm import tqdm

from model.checkpoint import load_checkpoint, read_config
from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import ByteTokenizer
from model.training.calibration import calibrate
from model.training.data import Corpus
from model.training.distributed import ALONE, Ranks
from model.training.faults import TrainingError, explain
from model.training.firing import sample_reduced
from model.training.grow import grow
from model.training.log import Means, TrainingLog, peak_memory
from model.training.optimizer import AdaptiveOptimizer
from model.training.recipe import Recipe
from model.training.saving import TrainingState, check_output, check_same_run, load_state, save_run
from model.training.validation import validate


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run reads and writes, and when it stops early."""

    corpus: Path
    output: Path
    resume: bool = False
    initial: Path | None = None
    """A checkpoint to start from, with a fresh optimiser."""
    grow: Path | None = None
    """A plain checkpoint to start from, around which the recipe's trunk grows."""
    device: str = "cpu"
    minutes: float | None = None
    """Stop (and save) after this long; resume goes on with the same schedule."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run left."""

    model: AdaptiveAttentionSystem
    steps: int
    """Done; fewer than the recipe's if the run was stopped."""


def train(run: Run, recipe: Recipe, ranks: Ranks = ALONE, stop_asked: Callable[[], bool] = lambda: False) -> Trained:
    """Train a model, or go on with a stopped run.

    A finished run is calibrated on the validation text, and its model counts as adapted to reduced budgets, unless it
    was trained at full resolution only. Writes a checkpoint, the state to resume from, and a log to ``run.output``.

    Args:
        ranks: the processes that train the model together; every one of them calls this.
        stop_asked: asked after each step, whether to save and stop; one process that is asked stops all.

    Raises:
        TrainingError: the output exists and ``resume`` is off, or the other way round; the settings or the text
            differ; the initial checkpoint reads subwords; the sequences cannot be shared among the processes.
        CorpusError, CheckpointError: the text or the initial checkpoint is unusable.
        BrokenRunError: the loss is not finite, memory or disk is full; the last saved state is whole.
    """
    trainer = _Trainer(run, recipe, ranks)
    steps, began, stopping = recipe.training.steps, time.monotonic(), False
    try:
        with trainer.progress() as bar:
            while trainer.step < steps and not stopping:
                trainer.advance(bar)
                out_of_time = run.minutes is not None and time.monotonic() - began > 60.0 * run.minutes
                stopping = trainer.agreed(stop_asked() or out_of_time)
                trainer.keep(last=stopping or trainer.step == steps)
        if trainer.step == steps:
            trainer.finish()
        ranks.wait()
    except (FloatingPointError, MemoryError, RuntimeError, OSError) as error:
        fault = explain(error, run.output, trainer.step + 1, trainer.saved)
        if fault is None:
            raise
        raise fault from error
    return Trained(trainer.model.eval(), trainer.step)


class _Trainer:
    """A run in progress: its text, its model and its optimiser, and how far it is."""

    def __init__(self, run: Run, recipe: Recipe, ranks: Ranks) -> None:
        config = recipe.training
        if config.sequences % ranks.size:
            raise TrainingError(f"sequences = {config.sequences} must be a multiple of the {ranks.size} processes")
        check_output(run.output, resume=run.resume)
        self._output, self._recipe, self._ranks, self._device = run.output, recipe, ranks, run.device
        self._corpus = Corpus.open(run.corpus, "train", recipe.data.weights)
        held_out = Corpus.open(run.corpus, "valid", recipe.data.weights)
        self._validation = held_out.batch(0, 0, config.validation_sequences, config.length).to(run.device)
        state = load_state(run.output, run.device) if run.resume else None
        if state is not None:
            check_same_run(state, recipe, self._corpus.sizes)
        torch.manual_seed(config.seed)
        self.model = _build(run, recipe, None if state is None else state.shape)
        self._optimizer = AdaptiveOptimizer(self.model, config, ranks)
        self.step, self.saved = 0, None if state is None else state.step
        self._seconds, self._bytes_before = 0.0, _bytes_of(run.initial or run.grow)
        if state is not None:
            self.model.load_state_dict(state.model)
            self._optimizer.load_state_dict(state.optimizer)
            self.step, self._seconds, self._bytes_before = state.step, state.seconds, state.bytes_before
        self._log = TrainingLog(run.output, self.step) if ranks.leads else None
        self._means = Means()
        self._learning_rate = 0.0

    @property
    def _batch_bytes(self) -> int:
        return self._recipe.training.sequences * self._recipe.training.length

    def progress(self) -> tqdm[Never]:
        """A bar over the bytes of the run: losses, bytes per second, time left."""
        total, done = (steps * self._batch_bytes for steps in (self._recipe.training.steps, self.step))
        return tqdm(total=total, initial=done, unit="B", unit_scale=True, mininterval=5, disable=not self._ranks.leads)

    def advance(self, bar: tqdm[Never]) -> None:
        """Take one step."""
        config, began = self._recipe.training, time.monotonic()
        batch = self._corpus.batch(config.seed, self.step + 1, config.sequences, config.length)
        reduced = None if config.plain else sample_reduced(config, self.model.config, self.step)
        taken = self._optimizer.optimize_step(self._ranks.rows(batch).to(self._device), reduced, self.step)
        self._ranks.average_buffers(self.model)
        bits = self._ranks.mean(torch.tensor(list(taken.bits.values()), dtype=torch.float64, device=self._device))
        self._means.add(dict(zip(taken.bits, bits.tolist(), strict=True)) | {"norm": taken.gradient_norm})
        self._learning_rate = taken.learning_rate
        self.step += 1
        self._seconds += time.monotonic() - began
        bar.set_postfix({name: f"{mean:.3f}" for name, mean in self._means.peek().items()}, refresh=False)
        bar.update(self._batch_bytes)

    def agreed(self, stop: bool) -> bool:
        """Whether any process says so."""
        return bool(self._ranks.mean(torch.tensor(float(stop), device=self._device)) > 0.0)

    def keep(self, *, last: bool) -> None:
        """Log, validate and save what is due, all of it after the ``last`` step."""
        config = self._recipe.training
        validating = last or self.step % config.validate_every == 0
        if self._log is not None and (validating or self.step % config.log_every == 0):
            self._record(validating=validating)
        if last or self.step % config.save_every == 0:
            self._save()

    def finish(self) -> None:
        """Calibrate the model, which counts as adapted from now on; one trained at full resolution only stays."""
        self.model.eval()
        if not self._recipe.training.plain:
            calibrate(self.model, self._validation)
            self.model.config = self.model.config.model_copy(update={"adapted": True})
            self._save()

    def _record(self, *, validating: bool) -> None:
        means = self._means.take()
        norm = means.pop("norm")
        row = {
            "step": self.step,
            "bytes": self.step * self._batch_bytes,
            "seconds": self._seconds,
            "learning_rate": self._learning_rate,
            "gradient_norm": norm,
            "memory_mib": peak_memory(self.model.device),
        }
        row |= {f"loss_{name}": mean for name, mean in means.items()}
        if validating:
            scores = validate(self.model, self._validation, plain=self._recipe.training.plain)
            row |= {f"validation_{name}": bits for name, bits in scores.items()}
        assert self._log is not None
        self._log.write(row)

    def _save(self) -> None:
        weights = self.model.state_dict()
        broken = [name for name, value in weights.items() if not value.isfinite().all()]
        if broken:
            raise FloatingPointError(f"{len(broken)} tensors, {broken[0]} first, are not finite after step {self.step}")
        if self._ranks.leads:
            state = TrainingState(
                step=self.step,
                seconds=self._seconds,
                bytes_before=self._bytes_before,
                recipe=self._recipe,
                shape=self.model.config,
                corpus=self._corpus.sizes,
                model=weights,
                optimizer=self._optimizer.state_dict(),
            )
            save_run(self._output, state, self.model)
        self.saved = self.step


def _build(run: Run, recipe: Recipe, resumed: ModelConfig | None) -> AdaptiveAttentionSystem:
    """The model to train: of the shape of a run that is resumed, from the initial checkpoint, or new."""
    if resumed is not None:
        model = AdaptiveAttentionSystem(resumed)
    elif run.initial is not None:
        if read_config(run.initial).special_tokens is not None:
            raise TrainingError(f"training reads bytes, and the tokens of {run.initial} are subwords")
        model = load_checkpoint(run.initial)
    elif run.grow is not None:
        model = grow(load_checkpoint(run.grow), recipe.model)
    else:  # one that is trained at full resolution only is not adapted to others
        adapted = recipe.model.adapted and not recipe.training.plain
        model = AdaptiveAttentionSystem(recipe.model.model_copy(update={"adapted": adapted}))
    ByteTokenizer().require_vocabulary(model.config.name, model.config.vocab_size)
    return model.requires_grad_(True).to(run.device).train()


def _bytes_of(initial: Path | None) -> int:
    """Bytes that a checkpoint has been trained on, over all runs that led to it."""
    return 0 if initial is None else int(read_config(initial).provenance.get("bytes", 0))
