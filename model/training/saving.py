"""What a run keeps on disk: the state that it resumes from, and the checkpoint that others read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from model.checkpoint import save_checkpoint
from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.training.faults import TrainingError
from model.training.recipe import Recipe

STATE_FILE = "training.pt"

MAY_CHANGE = ("steps", "checkpointing", "log_every", "validate_every", "save_every")
"""Settings that a resumed run may have otherwise: its end, and what does not touch the parameters."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything that a resumed run needs."""

    step: int
    """Steps done."""
    seconds: float
    """Time that they took."""
    bytes_before: int
    """Bytes that the initial checkpoint had been trained on, over all runs before this one."""
    recipe: Recipe
    shape: ModelConfig
    """Of the model: the recipe's, or the initial checkpoint's."""
    corpus: dict[str, int]
    """Bytes of training text by domain."""
    model: dict[str, Tensor]
    optimizer: list[dict[str, Any]]


def check_output(folder: Path, *, resume: bool) -> None:
    """See to it that a run neither overwrites another nor resumes none.

    Raises:
        TrainingError: the folder holds a run and ``resume`` is off, or the other way round.
    """
    exists = (folder / STATE_FILE).exists()
    if exists and not resume:
        raise TrainingError(f"{folder} already holds a run: resume it, or choose another output")
    if resume and not exists:
        raise TrainingError(f"{folder} holds no run to resume ({STATE_FILE} is missing)")


def load_state(folder: Path, device: str) -> TrainingState:
    """The state of a stopped run, its tensors on ``device``.

    Raises:
        TrainingError: it is damaged, or of another version.
    """
    path = folder / STATE_FILE
    try:
        saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        recipe = Recipe.model_validate_json(saved.pop("recipe"))
        shape = ModelConfig.model_validate_json(saved.pop("shape"))
        return TrainingState(recipe=recipe, shape=shape, **saved)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError, ValidationError) as error:
        raise TrainingError(f"{path} is damaged, or of another version: {error}") from error


def check_same_run(state: TrainingState, recipe: Recipe, corpus: dict[str, int]) -> None:
    """See to it that a resumed run reads and does what it would have, had it not stopped.

    Raises:
        TrainingError: the recipe differs in more than ``MAY_CHANGE``, or the text does; names what differs.
    """
    before, now = state.recipe.model_dump(), recipe.model_dump()
    for name in MAY_CHANGE:
        before["training"][name] = now["training"][name]
    for table, values in before.items():
        for key, value in values.items():
            if value != now[table][key]:
                raise TrainingError(f"the run has other settings: [{table}] {key} was {value}, not {now[table][key]}")
    if state.corpus != corpus:
        raise TrainingError(f"the run reads another text: bytes by domain were {state.corpus}, not {corpus}")


def save_run(folder: Path, state: TrainingState, model: AdaptiveAttentionSystem) -> None:
    """Write the checkpoint, then the state; each file appears whole or not at all.

    Raises:
        OSError: they cannot be written, for example because the disk is full. A state that was there is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {field.name: getattr(state, field.name) for field in fields(state)}
    content |= {"recipe": state.recipe.model_dump_json(), "shape": state.shape.model_dump_json()}
    batch = state.recipe.training.sequences * state.recipe.training.length
    provenance = {
        "steps": state.step,
        "bytes_before": state.bytes_before,
        "bytes": state.bytes_before + state.step * batch,
        "seed": state.recipe.training.seed,
    }
    with _whole_files(folder):
        save_checkpoint(model, folder, provenance)
        partial = folder / f"{STATE_FILE}.partial"
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / STATE_FILE)


@contextmanager
def _whole_files(folder: Path) -> Iterator[None]:
    """Give back the space of files that could not be finished; raises what stopped them as the OSError that it was."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        for partial in folder.glob("*.partial"):
            partial.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(str(error)) from error
        if isinstance(error.__context__, OSError):  # torch's writer raises its own error while it handles the file's
            raise error.__context__ from None
        raise
