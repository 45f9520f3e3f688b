"""Settings of a training run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from model.config import StrictModel


class TrainingConfig(StrictModel):
    """How a model is trained. Lengths in bytes, rates in trunk fires per byte."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    steps: int = Field(default=2000, ge=1)
    """Batches that the model is trained on in all."""
    sequences: int = Field(default=4, ge=1, le=4096)
    """Of one batch."""
    length: int = Field(default=2048, ge=64, le=1 << 17)
    """Bytes of one sequence."""
    learning_rate: float = Field(default=3e-3, gt=0, lt=1)
    """At its peak."""
    weight_decay: float = Field(default=0.05, ge=0, lt=1)
    """Of the matrices and the embedding."""
    warmup: int = Field(default=50, ge=0)
    """Steps over which the learning rate rises."""
    cooldown: float = Field(default=0.4, gt=0, le=1)
    """Share of the steps over which the learning rate falls."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    seed: int = Field(default=0, ge=0)
    """Of the weights, the text that is read, and the resolutions that are drawn."""
    plain: bool = False
    """Train at full resolution only: the plain Mamba-2 to compare with."""
    full_weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the full-resolution loss; what full resolution, smaller depths and floor leave belongs to a reduced pass
    over the same bytes."""
    shallow_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss of a trunk that runs everywhere but ends at a smaller depth, in every step; depths share it in
    proportion to their blocks, since a deeper one has more to lose."""
    floor_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss of a pass whose trunk never fires, in every step."""
    distillation: float = Field(default=0.0, ge=0, le=1)
    """Share of the floor's loss, in the steps after those of ``ends_share``, that is the divergence from what full
    resolution predicts of the same bytes, instead of the cost of the text (in-place distillation: Yu and Huang 2019). A
    teacher that knows as little as its pupil takes the text away from it."""
    # Passes at reduced rates from the first step on cost full resolution most of what its trunk could have learned.
    ends_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps, the first ones, that train full resolution, smaller depths and the floor alone, by their
    weights: no early exit, no density."""
    floor_share: float = Field(default=0.33, ge=0, le=1)
    """Share of steps whose reduced pass never fires."""
    uniform_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the other reduced passes that fire at a uniform stride."""
    level_share: float = Field(default=0.2, ge=0, le=1)
    """Share of reduced passes that run at a smaller state size."""
    shallow_share: float = Field(default=0.5, ge=0, le=1)
    """Share of reduced passes that place a stage below the last, where there is one; of several, each in proportion to
    its own blocks."""
    # Drawn uniformly: drawn uniformly by logarithm, middle budgets were hardly better than the floor.
    lowest_rate: float = Field(default=1 / 64, gt=0, le=1)
    """Of the other reduced passes."""
    highest_rate: float = Field(default=0.97, gt=0, le=1)
    """Of the other reduced passes."""
    exit_weight: float = Field(default=0.1, ge=0)
    """Weight of the early exit's loss."""
    lambda_info: float = Field(default=0.1, ge=0)
    """Weight of what keeps information: divergence from full resolution, the density's regression, and the error of
    what the trunk's states read between fires."""
    foresight: int = Field(default=64, ge=1, le=1 << 12)
    """Bytes ahead, this one included, over which the density learns what the trunk is worth: where it fires in
    stretches, a stretch decides, not a byte."""
    lambda_compute: float = Field(default=1.0, ge=0)
    """Weight of the squared difference between a text's expected compute and its budget."""
    checkpointing: bool = False
    """Compute the inside of each block again in the backward pass instead of keeping it: for long sequences."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of matrix products on a GPU, bf16 also on a CPU with AMX; states, sums and losses stay in fp32. fp16 scales the
    loss."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two rows of the log."""
    validate_every: int = Field(default=200, ge=1)
    """Steps between two validations."""
    validation_sequences: int = Field(default=16, ge=1)
    """Of validation text, of the length of those in training."""
    save_every: int = Field(default=100, ge=1)
    """Steps between two saved states."""

    @property
    def fixed_weight(self) -> float:
        """Share of the losses that every step has."""
        return self.full_weight + self.shallow_weight + self.floor_weight

    @property
    def first_reduced(self) -> int:
        """The first step whose reduced pass may run at any rate."""
        return round(self.ends_share * self.steps)

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        fixed = self.fixed_weight
        if fixed > 1.0 + 1e-9:
            raise ValueError(f"full_weight + shallow_weight + floor_weight = {fixed:g} must be at most 1")
        if self.ends_share > 0.0 and fixed <= 0.0:
            raise ValueError("full_weight, shallow_weight or floor_weight must be above 0 where ends_share is")
        return self
