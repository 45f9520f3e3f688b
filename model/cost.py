"""Floating-point operations of the model, counted exactly and in advance.

A multiply-add is two operations. Matrix products are counted as ``torch.utils.flop_counter`` counts them (a test holds
the two together). The recurrence and the convolution are counted per position as the recurrence needs them, whatever
algorithm runs, so that the bill of a byte does not depend on how a prompt was cut into calls. Element-wise work is
not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations by stage."""

    encoder: int = 0
    density: int = 0
    trunk: int = 0
    decoder: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """Operations of all stages."""
        return self.encoder + self.density + self.trunk + self.decoder + self.head

    def as_dict(self) -> dict[str, int]:
        """Operations by the name of the stage."""
        return {
            "encoder": self.encoder,
            "density": self.density,
            "trunk": self.trunk,
            "decoder": self.decoder,
            "head": self.head,
        }

    def __add__(self, other: Self) -> Flops:
        # Spelt out: a decoding step adds these for every sequence.
        return Flops(
            self.encoder + other.encoder,
            self.density + other.density,
            self.trunk + other.trunk,
            self.decoder + other.decoder,
            self.head + other.head,
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """Trunk fires per byte that keep a budget while reading a prompt and while generating."""

    prefill: float
    decode: float
    depth: int | None = None
    """Blocks of the trunk that run when it fires; None for all."""


class CostModel:
    """What the parts of one model cost, and which fire rate a budget buys."""

    def __init__(self, config: ModelConfig) -> None:
        def block(width: int) -> int:
            inner, heads, state = config.inner(width), config.heads(width), config.d_state
            mixed = inner + 2 * state
            linear = 2 * width * (inner + mixed + heads) + 2 * inner * width
            return linear + 2 * config.d_conv * mixed + 5 * inner * state

        head = 2 * config.vocab_size * config.d_model
        inner = config.inner(config.d_model)
        window = 2 * config.density_window * config.d_state
        measured = head + 4 * inner * config.d_state + window if config.density_measured else 0
        learned = 2 * config.density_hidden * (config.d_model + 4)  # it also reads the other four features
        self._projections = 4 * config.d_model * config.d_trunk if config.projected else 0
        self._block = block(config.d_trunk)
        self._layers = config.trunk_layers
        self._unit = Flops(
            encoder=config.encoder_layers * block(config.d_model),
            density=measured + learned,
            trunk=self.trunk(),
            decoder=config.decoder_layers * block(config.d_model),
            head=head,
        )
        self._code, self._read = _propagation(config)
        self._d_state = config.d_state
        self._column = config.inner(config.d_trunk)
        self._lowest_rate = 1.0 / config.max_tile_size
        self._shallow = tuple(zip(config.shallow_depths, config.shallow_budgets, strict=False))

    def trunk(self, depth: int | None = None) -> int:
        """Operations of a fire: of ``depth`` blocks, None for all, and of the projections around them."""
        return (self._layers if depth is None else depth) * self._block + self._projections

    def propagation(self, depth: int | None = None) -> int:
        """Operations of the trunk's states reading a byte at which it does not run; 0 where they skip it."""
        return self._code + (self._layers if depth is None else depth) * self._read

    def fire(self, depth: int | None = None) -> int:
        """Operations by which a fire costs more than a byte at which the trunk does not run."""
        return self.trunk(depth) - self.propagation(depth)

    def depth(self, budget: float) -> int | None:
        """Blocks of the trunk that run at ``budget``; None for all."""
        return next((depth for depth, highest in self._shallow if budget <= highest), None)

    @property
    def unit(self) -> Flops:
        """Operations of each stage when it runs once."""
        return self._unit

    @lru_cache(maxsize=4096)  # noqa: B019 - a model has one, which lives as long as it does
    def flops(
        self,
        positions: int,
        tiles: int,
        logits: int,
        analysed: int,
        columns: int | None = None,
        *,
        propagated: int | None = None,
        depth: int | None = None,
    ) -> Flops:
        """Operations spent.

        Args:
            positions: tokens read. tiles: of them, how many the trunk ran at. logits: positions at which the head ran.
            analysed: positions at which the density was computed (rates other than 0 and 1).
            columns: of the trunk's state that ran; None for all.
            propagated: positions that the trunk's states read without a tile; None for those analysed that are not one.
            depth: blocks of the trunk that ran; None for all.
        """
        unit = self._unit
        blocks = self._layers if depth is None else depth
        spared = 0 if columns is None else (self._d_state - columns) * self._column * blocks
        read = max(analysed - tiles, 0) if propagated is None else propagated
        return Flops(
            encoder=positions * unit.encoder,
            density=analysed * unit.density,
            trunk=tiles * (self.trunk(depth) - 5 * spared) + read * self.propagation(depth),
            decoder=positions * unit.decoder,
            head=logits * unit.head,
        )

    def full_flops(self, positions: int, logits: int) -> int:
        """Operations of the same work at full resolution."""
        return self.flops(positions, positions, logits, 0).total

    @staticmethod
    def analysed(rate: float) -> bool:
        """Whether a sequence at this fire rate needs its density computed."""
        return 0.0 < rate < 1.0

    @property
    def floor(self) -> float:
        """Ratio to full resolution of generating without the trunk: the lowest there is."""
        return self.flops(1, 0, 1, 0).total / self.full_flops(1, 1)

    @property
    def least_adaptive(self) -> float:
        """The lowest budget that pays for the density and one tile in ``max_tile_size`` bytes."""
        return self.budget(self._lowest_rate, logits=1, depth=self.depth(0.0))

    def budget(self, rate: float, *, logits: int, depth: int | None = None) -> float:
        """Ratio to full resolution of reading at ``rate`` with ``logits`` (0 or 1) predictions per byte."""
        unit = self._unit
        outer = unit.encoder + unit.decoder + logits * unit.head
        if not self.analysed(rate):
            return (outer + rate * self.trunk(depth)) / (outer + unit.trunk)
        between = unit.density + self.propagation(depth)
        return (outer + between + rate * self.fire(depth)) / (outer + unit.trunk)

    def rate(self, budget: float, *, logits: int, depth: int | None = None) -> float:
        """Fires per byte that ``budget`` (share of full resolution) pays for, at most 1; 0 where it pays for none."""
        unit = self._unit
        outer = unit.encoder + unit.decoder + logits * unit.head
        left = budget * (outer + unit.trunk) - outer
        if left >= self.trunk(depth):
            return 1.0
        return min(max(left - unit.density - self.propagation(depth), 0.0) / self.fire(depth), 1.0)

    def rates(self, budget: float) -> Rates:
        """Fire rates and depth for a request with this budget; both rates 0 under :attr:`least_adaptive`."""
        depth = self.depth(budget)
        if budget < min(self.least_adaptive, 1.0):
            return Rates(0.0, 0.0, depth)
        return Rates(self.rate(budget, logits=0, depth=depth), self.rate(budget, logits=1, depth=depth), depth)


def _propagation(config: ModelConfig) -> tuple[int, int]:
    """Of one byte: its code, and in a block of the trunk what the convolution and the state read of it.

    The columns of the smallest level decay and are written; the others decay with the next tile, for all bytes at once.
    """
    rank = config.propagation_rank
    if not rank:
        return 0, 0
    inner, heads = config.inner(config.d_trunk), config.heads(config.d_trunk)
    mixed = inner + 2 * config.d_state
    block = 2 * rank * (mixed + heads) + 2 * config.d_conv * mixed
    block += 3 * inner * config.d_state_levels[0]
    return 2 * config.d_model * rank, block
