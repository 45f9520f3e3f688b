"""Floating-point operations of the model, counted exactly and in advance.

A multiply-add is two operations. Matrix products are counted as ``torch.utils.flop_counter`` counts them (a test holds
the two together). The recurrence and the convolution are counted per position as the recurrence needs them, whatever
algorithm runs, so that the bill of a byte does not depend on how a prompt was cut into calls. Element-wise work is
not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
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
    """Blocks of the trunk that run when it fires, those of the stages below at every byte; None for all."""


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
        widths = [config.d_model, *[config.d_trunk] * len(config.shallow_depths)]  # of what each stage is given
        # The learned feature also reads the other four.
        self._densities = [measured + 2 * config.density_hidden * (width + 4) for width in widths]
        self._codes = [2 * width * config.propagation_rank for width in widths]
        self._projection = 2 * config.d_model * config.d_trunk if config.projected else 0
        self._block = block(config.d_trunk)
        self._config = config
        self._unit = Flops(
            encoder=config.encoder_layers * block(config.d_model),
            density=self._densities[0],
            trunk=self.trunk(),
            decoder=config.decoder_layers * block(config.d_model),
            head=head,
        )
        self._read = _read_flops(config)
        self._d_state = config.d_state
        self._column = config.inner(config.d_trunk)
        lowest = 1.0 / config.max_tile_size
        later = config.least_rates or (lowest,) * len(config.shallow_depths)
        least = zip((*config.shallow_depths, None), (lowest, *later), strict=True)
        self._starts = [(depth, self.budget(max(rate, lowest), logits=1, depth=depth)) for depth, rate in least]

    def trunk(self, depth: int | None = None) -> int:
        """Operations of ``depth`` blocks at a byte, None for all, and of the projections around their stages."""
        blocks = self._config.trunk_layers if depth is None else depth
        return blocks * self._block + (2 + self._config.stage(depth)) * self._projection

    def below(self, depth: int | None = None) -> int:
        """Of them, those of the stages below the last: they run at every byte."""
        base = self._config.base(depth)
        return self.trunk(base) if base else 0

    def tile(self, depth: int | None = None) -> int:
        """Of them, those of the last stage: what a fire runs."""
        return self.trunk(depth) - self.below(depth)

    def density(self, depth: int | None = None) -> int:
        """Operations of the density that places the stage which ends after ``depth`` blocks, at a byte."""
        return self._densities[self._config.stage(depth)]

    def propagation(self, depth: int | None = None) -> int:
        """Operations of its states reading a byte at which it does not run; 0 where they skip it."""
        return self._codes[self._config.stage(depth)] + self._own_blocks(depth) * self._read

    def fire(self, depth: int | None = None) -> int:
        """Operations by which a fire costs more than a byte at which the stage does not run."""
        return self.tile(depth) - self.propagation(depth)

    def depth(self, budget: float) -> int | None:
        """Blocks of the trunk that run at ``budget``, None for all: as many as it can pay for with fires to place.

        How many fires a stage must have is in ``least_rates``; with fewer, those below it run everywhere.
        """
        (first, _), *later = self._starts
        return next((depth for depth, least in reversed(later) if budget >= min(least, 1.0)), first)

    def at_share(self, share: Fraction) -> tuple[int | None, float]:
        """The depth, None for all, and the fires per byte at which that share of the trunk's blocks runs."""
        blocks = share * self._config.trunk_layers
        depth = next((depth for depth in self._config.shallow_depths if blocks <= depth), None)
        return depth, float((blocks - self._config.base(depth)) / self._own_blocks(depth))

    def _own_blocks(self, depth: int | None) -> int:
        """Blocks of the stage that ends after ``depth``."""
        return (self._config.trunk_layers if depth is None else depth) - self._config.base(depth)

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
            positions: tokens read. tiles: of them, those at which the trunk fired. logits: those at which the head ran.
            analysed: positions at which the density was computed (rates other than 0 and 1).
            columns: of the trunk's state that ran; None for all.
            propagated: positions that the trunk's states read without a tile; None for those analysed that are not one.
            depth: blocks of the trunk that ran at a tile, those of the stages below at every position; None for all.
        """
        unit = self._unit
        run = positions * self._config.base(depth) + tiles * self._own_blocks(depth)
        spared = 0 if columns is None else 5 * (self._d_state - columns) * self._column * run
        read = max(analysed - tiles, 0) if propagated is None else propagated
        trunk = positions * self.below(depth) + tiles * self.tile(depth) + read * self.propagation(depth)
        return Flops(
            encoder=positions * unit.encoder,
            density=analysed * self.density(depth),
            trunk=trunk - spared,
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
        return self.flops(1, 0, 1, 0, depth=self._config.depths[0]).total / self.full_flops(1, 1)

    @property
    def least_adaptive(self) -> float:
        """The lowest budget that pays for the density and one tile in ``max_tile_size`` bytes."""
        return self._starts[0][1]

    def budget(self, rate: float, *, logits: int, depth: int | None = None) -> float:
        """Ratio to full resolution of reading at ``rate`` with ``logits`` (0 or 1) predictions per byte."""
        outer = self._outer(logits)
        if self.analysed(rate):
            between = self.below(depth) + self.density(depth) + self.propagation(depth) + rate * self.fire(depth)
        else:
            between = self.trunk(depth) if rate >= 1.0 else self.below(depth)
        return (outer + between) / (outer + self._unit.trunk)

    def rate(self, budget: float, *, logits: int, depth: int | None = None) -> float:
        """Fires per byte that ``budget`` (share of full resolution) pays for, at most 1; 0 where it pays for none."""
        outer = self._outer(logits)
        left = budget * (outer + self._unit.trunk) - outer
        if left >= self.trunk(depth):
            return 1.0
        left -= self.below(depth) + self.density(depth) + self.propagation(depth)
        return min(max(left, 0.0) / self.fire(depth), 1.0)

    def _outer(self, logits: int) -> int:
        """Operations at a byte outside the trunk, with ``logits`` (0 or 1) predictions."""
        return self._unit.encoder + self._unit.decoder + logits * self._unit.head

    def rates(self, budget: float) -> Rates:
        """Fire rates and depth for a request with this budget; both rates 0 under :attr:`least_adaptive`."""
        depth = self.depth(budget)
        if budget < min(self.least_adaptive, 1.0):
            return Rates(0.0, 0.0, depth)
        return Rates(self.rate(budget, logits=0, depth=depth), self.rate(budget, logits=1, depth=depth), depth)


def _read_flops(config: ModelConfig) -> int:
    """Of one byte: what the convolution and the state of a block in the trunk read of its code.

    The columns of the smallest level decay and are written; the others decay with the next tile, for all bytes at once.
    """
    rank = config.propagation_rank
    if not rank:
        return 0
    inner, heads = config.inner(config.d_trunk), config.heads(config.d_trunk)
    mixed = inner + 2 * config.d_state
    return 2 * rank * (mixed + heads) + 2 * config.d_conv * mixed + 3 * inner * config.d_state_levels[0]
