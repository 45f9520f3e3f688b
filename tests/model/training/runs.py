"""Tiny runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.training.config import TrainingConfig
from model.training.recipe import Recipe
from tests.model.shapes import SMALL

SHAPE = ModelConfig(**{**SMALL.model_dump(), "name": "run"})
CONFIG = TrainingConfig(
    steps=6,
    sequences=2,
    length=128,
    warmup=2,
    log_every=1,
    validate_every=3,
    validation_sequences=2,
    save_every=3,
    floor_share=0.3,
)
RECIPE = Recipe(model=SHAPE, training=CONFIG)

RECIPE_TOML = """
[model]
name = "run"
d_model = 32
d_trunk = 48
trunk_layers = 2
headdim = 16
d_state = 16
d_state_levels = [4, 8, 16]
chunk_size = 16
max_tile_size = 64
block_size = 64
density_window = 8
[training]
steps = 6
sequences = 2
length = 128
warmup = 2
log_every = 1
validate_every = 3
validation_sequences = 2
save_every = 3
floor_share = 0.3
"""
"""``RECIPE`` as a file."""


def recipe(**training: object) -> Recipe:
    return RECIPE.model_copy(update={"training": CONFIG.model_copy(update=training)})


def after(steps: int) -> Callable[[], bool]:
    """A wish to stop after so many steps."""
    done = count(1)
    return lambda: next(done) >= steps


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "valid"):
        text = "\0".join(f"document {n}: " + "the quick brown fox jumps. " * 12 for n in range(20)) + "\0"
        (folder / f"prose.{split}.txt").write_text(text)
        (folder / f"code.{split}.txt").write_text(text.replace("fox", "def"))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder).state_dict()
