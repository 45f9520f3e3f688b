"""The model's shape, as frozen, strict, JSON-serialisable data."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.tokenizer import VOCAB_SIZE

Positive = Annotated[int, Field(ge=1, le=1 << 20)]
Rate = Annotated[float, Field(gt=0.0, le=1.0)]


class StrictModel(BaseModel):
    """Base of every configuration: unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ModelConfig(StrictModel):
    """Shape of an :class:`~model.lm.AdaptiveAttentionSystem`.

    The encoder and decoder run at every byte with width ``d_model``; the trunk runs once per tile with width
    ``d_trunk``. Names follow Mamba-2 (Dao and Gu 2024) where it has a name.
    """

    name: str = Field(default="rheostat-small", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    vocab_size: int = Field(default=VOCAB_SIZE, ge=2, le=1 << 20)
    tied_head: bool = True
    """Whether the head's weights are the embedding's."""
    adapted: bool = True
    """Whether the weights were trained to run at reduced budgets; a converted model's were not."""
    d_model: Positive = 192
    d_trunk: Positive = 256
    encoder_layers: Positive = 1
    trunk_layers: Positive = 4
    shallow_depths: tuple[Positive, ...] = ()
    """Numbers of blocks, below ``trunk_layers``, after which the trunk may end: they cut it into stages, of which one
    runs at some bytes once those below it run at all. Each stage has a density of its own."""
    least_rates: tuple[Rate, ...] = ()
    """Fires per byte from which on each stage after the first is placed: with fewer, those below it do better alone.
    Fitted at the end of training; none given: 1 in ``max_tile_size`` for all, as for the first."""
    decoder_layers: int = Field(default=1, ge=0, le=64)
    own_decoders: bool = False
    """Whether each stage of the trunk has a decoder of its own, of so many layers, for when it is placed: more weights,
    but no more operations."""
    expand: Positive = 2
    headdim: Positive = 64
    d_state: Positive = 64
    d_state_levels: tuple[Positive, ...] = (16, 32, 64)
    """State sizes the trunk can run at; the last one is ``d_state``."""
    d_conv: int = Field(default=4, ge=2, le=16)
    dt_limits: tuple[float, float | None] = (0.0, None)
    """Least and greatest step size of the recurrence, before the stretch of a tile; None for no limit."""
    chunk_size: Positive = 64
    """Positions per chunk of the scan."""
    min_tile_size: Positive = 1
    max_tile_size: Positive = 128
    block_size: Positive = 512
    """Bytes planned (and prefilled) together, counted from the start of the sequence."""
    propagation_rank: int = Field(default=0, ge=0, le=1 << 12)
    """Size of the code through which the trunk's states read a byte where it does not fire; 0: they skip it."""
    density_window: Positive = 32
    """Keys that the attention features look back at one by one; older ones are lumped together."""
    density_hidden: int = Field(default=0, ge=0, le=1 << 12)
    """Hidden units of the density's learned feature; 0 for none."""
    density_measured: bool = True
    """Whether the density reads the four measured features; the learned one alone needs no early exit and no trace."""
    window_size: Positive = 64
    """Bytes over which the density that decides where the trunk runs is averaged, causally."""
    inertia: float = Field(default=3.0, ge=0.0, le=100.0)
    """What keeps stretches of fires together, in units of the spread of the log density."""
    restart_bytes: float = Field(default=2.0, ge=0.0, le=1000.0)
    """What a plan counts as lost while the trunk warms up after a gap, in bytes of typical density."""
    norm_eps: float = Field(default=1e-5, gt=0.0, lt=1e-2)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("d_model", "d_trunk"):
            inner = self.expand * getattr(self, field)
            if inner % self.headdim:
                raise ValueError(f"expand * {field} = {inner} must be a multiple of headdim = {self.headdim}")
        levels = self.d_state_levels
        if not levels or list(levels) != sorted(set(levels)) or levels[-1] != self.d_state:
            raise ValueError(f"d_state_levels = {levels} must rise strictly and end at d_state = {self.d_state}")
        depths = self.depths
        if list(depths) != sorted(set(depths)):
            raise ValueError(f"shallow_depths = {depths[:-1]} must rise strictly and end below {depths[-1]}")
        if self.least_rates and len(self.least_rates) != len(self.shallow_depths):
            raise ValueError(f"least_rates = {self.least_rates} must be as many as shallow_depths = {depths[:-1]}")
        if len(depths) > 1 and self.density_measured:
            raise ValueError("density_measured must be off where there are shallow_depths: only the first stage could")
        if len(depths) > 1 and not self.propagation_rank:
            raise ValueError("propagation_rank must be above 0 where there are shallow_depths")
        if self.own_decoders and not (self.shallow_depths and self.decoder_layers):
            raise ValueError("own_decoders needs shallow_depths, and decoder_layers above 0")
        if not self.min_tile_size <= self.max_tile_size <= self.block_size:
            raise ValueError(
                f"tile sizes must satisfy min_tile_size = {self.min_tile_size} <= max_tile_size = "
                f"{self.max_tile_size} <= block_size = {self.block_size}"
            )
        if self.block_size % self.chunk_size:
            raise ValueError(f"block_size = {self.block_size} must be a multiple of chunk_size = {self.chunk_size}")
        least, most = self.dt_limits
        if not 0.0 <= least < (math.inf if most is None else most):
            raise ValueError(f"dt_limits = {self.dt_limits} must be at least 0, and rise")
        if not self.density_measured and not self.density_hidden:
            raise ValueError("density_hidden must be at least 1 where density_measured is off: nothing else is read")
        return self

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of blocks that the trunk can run with, all of them last."""
        return (*self.shallow_depths, self.trunk_layers)

    @property
    def shallow_shares(self) -> tuple[float, ...]:
        """Shares of the smaller depths in one figure for all of them: in proportion to their blocks."""
        return tuple(depth / sum(self.shallow_depths) for depth in self.shallow_depths)

    def stage(self, depth: int | None) -> int:
        """Number of the stage, from 0, that ends after ``depth`` blocks; None for all of them."""
        return len(self.shallow_depths) if depth is None else self.depths.index(depth)

    def base(self, depth: int | None) -> int:
        """Blocks of the stages below the one that ends after ``depth`` blocks."""
        return (0, *self.depths)[self.stage(depth)]

    @property
    def projected(self) -> bool:
        """Whether projections stand between the outer width and the trunk's."""
        return self.d_model != self.d_trunk

    def inner(self, width: int) -> int:
        """Inner width of a Mamba-2 block of model width ``width``."""
        return self.expand * width

    def heads(self, width: int) -> int:
        """Number of heads of a Mamba-2 block of model width ``width``."""
        return self.inner(width) // self.headdim
