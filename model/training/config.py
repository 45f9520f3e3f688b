"""Settings of a training run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from model.config import StrictModel


class TrainingConfig(StrictModel):
    """How a model is trained. Lengths in bytes, rates in trunk fires per byte."""

    steps: int = Field(default=2000, ge=1)
    sequences: int = Field(default=4, ge=1, le=4096)
    length: int = Field(default=2048, ge=64, le=1 << 17)
    learning_rate: float = Field(default=3e-3, gt=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0, lt=1)
    warmup: int = Field(default=50, ge=0)
    cooldown: float = Field(default=0.4, gt=0, le=1)
    """Share of the steps over which the learning rate falls."""
    clip: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)
    plain: bool = False
    """Train at full resolution only: the plain Mamba-2 to compare with."""
    full_weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the full-resolution loss; the rest belongs to the reduced pass over the same bytes."""
    floor_share: float = Field(default=0.33, ge=0, le=1)
    """Share of steps whose reduced pass never fires."""
    uniform_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the other reduced passes that fire at a uniform stride."""
    level_share: float = Field(default=0.2, ge=0, le=1)
    """Share of reduced passes that run at a smaller state size."""
    # Drawn uniformly: drawn uniformly by logarithm, middle budgets were hardly better than the floor.
    lowest_rate: float = Field(default=1 / 64, gt=0, le=1)
    highest_rate: float = Field(default=0.97, gt=0, le=1)
    exit_weight: float = Field(default=0.1, ge=0)
    lambda_info: float = Field(default=0.1, ge=0)
    """Weight of what keeps information: divergence from full resolution, and the density's regression."""
    lambda_compute: float = Field(default=1.0, ge=0)
    """Weight of the squared difference between a text's expected compute and its budget."""
    checkpointing: bool = False
    """Compute the inside of each block again in the backward pass instead of keeping it: for long sequences."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of matrix products on a GPU; states, sums and losses stay in fp32. fp16 scales the loss."""
    validate_every: int = Field(default=200, ge=1)
    validation_sequences: int = Field(default=16, ge=1)
    save_every: int = Field(default=100, ge=1)
