"""The training loss: full and reduced resolution on the same bytes.

Source: ``compute_loss``, section 4.5.1 of the source document: task + lambda_compute * compute + lambda_info *
information preservation. A penalty on all compute would have no gradient, since the firing rule meets the sampled rate
over a batch by construction; the compute term is on what each text of it is away from that rate at a common threshold.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers.mamba2 import AdaptiveMambaBlock
from model.lm import AdaptiveAttentionSystem, Encoded, Entrance
from model.ops.tiling import Floats
from model.training.config import TrainingConfig
from model.training.expected import expected_rates
from model.training.firing import Reduced, choose_fires

_SAMPLED = 4
"""Of so many bytes one says how far propagation is off; at all of them that takes a tenth of a step's time."""


@dataclass(slots=True)
class Loss:
    """A loss to differentiate, and what to show of it."""

    total: Tensor
    bits: dict[str, float] = field(default_factory=dict)
    """Bits per byte by pass."""

    def show(self, name: str, cost: Tensor) -> None:
        """Show the mean of costs in nats."""
        self.bits[name] = cost.mean().item() / math.log(2.0)


@dataclass(frozen=True, slots=True)
class Everywhere:
    """Texts of which every byte was read at full resolution."""

    encoded: Encoded
    entrances: list[Entrance]
    """What each stage was given."""
    recorded: list[Tensor]
    """By :func:`recorded_inputs`."""
    logits: list[Tensor]
    """[B, L, V] by depth, the last of all blocks."""
    costs: list[Tensor]
    """Nats [B, L] by depth."""


@dataclass(frozen=True, slots=True)
class Placed:
    """The same texts, one stage of the trunk placed at some of the bytes."""

    density: Tensor
    """[B, L] bits, differentiable in its weights."""
    fires: Tensor
    """[B, L] bool."""
    logits: Tensor
    cost: Tensor
    """Nats [B, L]."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats [B, L] of logits [B, L, V]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def compute_loss(
    model: AdaptiveAttentionSystem, tokens: Tensor, reduced: Reduced | None, config: TrainingConfig
) -> Loss:
    """Loss of one batch of tokens [B, L + 1]; ``reduced`` None trains the full resolution alone."""
    targets = tokens[:, 1:]
    fresh = _read_everywhere(model, tokens)
    full = fresh.costs[-1].mean()
    loss = Loss(full)
    loss.show("full", full)
    if reduced is None:
        return loss
    task = config.full_weight * full
    if len(fresh.costs) > 1:
        shares = zip(model.config.shallow_shares, fresh.costs[:-1], strict=True)
        shallow = torch.stack([share * cost.mean() for share, cost in shares]).sum()
        task = task + config.shallow_weight * shallow
        loss.show("shallow", shallow)
    if reduced.ends_only:
        floor = cross_entropy(floor_logits(model, fresh.encoded), targets).mean()
        loss.total = (task + config.floor_weight * floor) / config.fixed_weight
        loss.show("floor", floor)
        return loss

    measured = model.density.measured or config.exit_weight > 0.0
    exit_logits = model.exit_head(fresh.encoded.hidden) if measured else None
    placed = _read_placed(model, fresh, exit_logits, targets, reduced)
    with torch.set_grad_enabled(config.floor_weight > 0.0):
        is_floor = reduced.rate == 0 and not model.config.stage(reduced.depth)
        at_floor = placed.logits if is_floor else floor_logits(model, fresh.encoded)
        floor_cost = cross_entropy(at_floor, targets)
    floor = floor_cost.mean()
    if config.distillation:
        floor = torch.lerp(floor, divergence(at_floor, fresh.logits[-1]), config.distillation)
    task = task + config.floor_weight * floor + (1.0 - config.fixed_weight) * placed.cost.mean()
    loss.total = task + config.lambda_info * _information(model, fresh, placed, floor_cost, reduced, config)
    if config.lambda_compute > 0.0 and model.cost.analysed(reduced.rate) and not reduced.uniform:
        error = compute_error(model, placed.density, reduced.rate, reduced.depth)
        loss.total = loss.total + config.lambda_compute * error
    if exit_logits is not None:
        exit_loss = cross_entropy(exit_logits, targets).mean()
        loss.total = loss.total + config.exit_weight * exit_loss
        loss.show("exit", exit_loss)
    loss.show("floor", floor_cost)
    if reduced.rate > 0:
        loss.show("reduced", placed.cost)
    return loss


def _read_everywhere(model: AdaptiveAttentionSystem, tokens: Tensor) -> Everywhere:
    """The full pass over tokens [B, L + 1]."""
    encoded = model.encode(tokens[:, :-1], model.allocate_state(len(tokens)).encoder)
    with recorded_inputs(model) as recorded:
        outputs, entrances = model.combine_everywhere(encoded.hidden)
    logits = [model.head(output) for output in outputs]
    return Everywhere(encoded, entrances, recorded, logits, [cross_entropy(each, tokens[:, 1:]) for each in logits])


def _read_placed(
    model: AdaptiveAttentionSystem, fresh: Everywhere, exit_logits: Tensor | None, targets: Tensor, reduced: Reduced
) -> Placed:
    """The reduced pass."""
    hidden, stage = fresh.encoded.hidden, model.config.stage(reduced.depth)
    density, smoothed = _analyse(model, exit_logits, fresh.encoded, fresh.entrances[stage], reduced)
    fires = torch.from_numpy(choose_fires(model.placements()[stage][1], smoothed, reduced)).to(hidden.device)
    state = model.allocate_state(len(hidden), d_state=reduced.d_state, depth=reduced.depth)
    # At another state size the stages below give something else, too.
    given = fresh.entrances[stage] if reduced.d_state is None else None
    logits = model.head(model.combine(hidden, fires, state, propagate=reduced.rate > 0.0, entrance=given))
    return Placed(density, fires, logits, cross_entropy(logits, targets))


def _information(
    model: AdaptiveAttentionSystem,
    fresh: Everywhere,
    placed: Placed,
    floor_cost: Tensor,
    reduced: Reduced,
    config: TrainingConfig,
) -> Tensor:
    """What the reduced pass lost of what full resolution knows, and how badly that was foreseen."""
    stage = model.config.stage(reduced.depth)
    below, here = fresh.costs[stage - 1] if stage else floor_cost, fresh.costs[stage].detach()
    worth = mean_ahead(below.detach() - here, config.foresight)
    stale_cost = placed.cost.detach() - here
    information = divergence(placed.logits, fresh.logits[-1]) + density_regression(
        model, placed.density, worth, stale_cost, placed.fires, reduced.depth
    )
    if fresh.recorded:
        information = information + propagation_error(model, fresh.entrances, fresh.recorded)
    return information


def _analyse(
    model: AdaptiveAttentionSystem,
    exit_logits: Tensor | None,
    encoded: Encoded,
    entrance: Entrance,
    reduced: Reduced,
) -> tuple[Tensor, Floats]:
    """Density [B, L], differentiable in its weights, and smoothed; in training the running statistics move."""
    inputs = entrance.inputs.detach().float()
    analyzer, tiles = model.placements()[entrance.stage]
    state = analyzer.zero_state(len(inputs), inputs.device)
    with torch.autocast(inputs.device.type, enabled=False):
        exits = None if exit_logits is None else exit_logits.detach().float()
        features, analysed = analyzer(inputs, exits, encoded.trace, state)
        if model.training:
            analyzer.update_statistics(features, reduced.momentum)
        density = analyzer.combine(features)
    smoothed = analyzer.smooth(density.detach(), state, analysed)
    if model.training:
        tiles.update_spread(smoothed, reduced.momentum)
    return density, smoothed


def floor_logits(model: AdaptiveAttentionSystem, encoded: Encoded) -> Tensor:
    """Logits [B, L, V] of texts from their start, the trunk run nowhere."""
    fires = torch.zeros(encoded.hidden.shape[:2], dtype=torch.bool, device=encoded.hidden.device)
    state = model.allocate_state(len(fires), depth=model.config.depths[0])
    return model.head(model.combine(encoded.hidden, fires, state, propagate=False))


def divergence(logits: Tensor, full_logits: Tensor) -> Tensor:
    """Divergence in nats per byte of logits [B, L, V] from those at full resolution, which are taken as given.

    Over all texts: one alone, as it once was, is noise that outweighs the gradients of all others in a large batch.
    """
    mine, full = logits.float().log_softmax(-1), full_logits.detach().float().log_softmax(-1)
    return F.kl_div(mine, full, log_target=True, reduction="sum") / mine[..., 0].numel()


def compute_error(model: AdaptiveAttentionSystem, density: Tensor, rate: float, depth: int | None = None) -> Tensor:
    """Mean over texts of (expected compute - budget)², compute as a share of full resolution.

    Args:
        density: [B, L] bits, differentiable. rate: fires per byte that the budget pays for, between 0 and 1.
        depth: blocks of the trunk that a fire runs; None for all.
    """
    cost = model.cost
    fire = cost.fire(depth) / cost.full_flops(1, 1)
    analyzer, tiles = model.placement(depth)
    expected = expected_rates(density, rate, analyzer.window_size, tiles.spread)
    return (fire * (expected - rate)).square().mean().float()


def density_regression(
    model: AdaptiveAttentionSystem,
    density: Tensor,
    worth: Tensor,
    stale_cost: Tensor,
    fires: Tensor,
    depth: int | None = None,
) -> Tensor:
    """Mean squared errors in bits² of the density, and of ``density * staleness(age)``.

    The density learns what its stage is worth at every byte, also where it always fires; a stale trunk's cost says
    nothing there, and an order that was once wrong would stay. The staleness learns from what being stale did cost.

    Args:
        density: [B, L] bits, differentiable. worth: [B, L] nats that the stage saves where it runs everywhere, a mean
            over the bytes that the density is to foresee.
        stale_cost: [B, L] nats lost by the reduced pass. fires: [B, L] bool, of the reduced pass.
        depth: blocks after which the stage ends that is placed; None for all.
    """
    position = torch.arange(1, fires.shape[1] + 1, device=fires.device)
    age = position - torch.where(fires, position, 0).cummax(1).values
    stale = density.detach() * model.placement(depth)[1].staleness(age)
    return (density - clamped_bits(worth)).square().mean() + (stale - clamped_bits(stale_cost)).square().mean()


@contextmanager
def recorded_inputs(model: AdaptiveAttentionSystem) -> Iterator[list[Tensor]]:
    """What the convolutions and recurrences of the trunk are given while it runs, block by block.

    [B, ceil(L / 4), x B C | dt], of every fourth byte; nothing is recorded of a model that does not propagate.
    """
    recorded: list[Tensor] = []
    handles = []
    if model.router.code is not None:
        for block in _trunk(model):
            first = block.mixer.d_inner

            def record(_module: object, _inputs: object, projected: Tensor, first: int = first) -> None:
                recorded.append(projected.detach()[:, ::_SAMPLED, first:])

            handles.append(block.mixer.in_proj.register_forward_hook(record))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def propagation_error(
    model: AdaptiveAttentionSystem, entrances: Sequence[Entrance], recorded: Sequence[Tensor]
) -> Tensor:
    """How far what states read between fires is from what a fire would have given them, as a share of its variance.

    The loss of a reduced pass alone teaches this slowly: it is felt only through the bytes that fire later.

    Args:
        entrances: what each stage was given, taken as it is. recorded: by :func:`recorded_inputs`.
    """
    codes = [model.router.propagated(one.inputs.detach()[:, ::_SAMPLED], one.stage) for one in entrances]
    errors = []
    for number, (block, given) in enumerate(zip(_trunk(model), recorded, strict=True)):
        assert block.mixer.propagation is not None
        stage = bisect_right(model.config.depths, number)
        given = given.float()
        error = (block.mixer.propagation(codes[stage]).float() - given).square().mean((0, 1))
        squares = (given - given.mean((0, 1))).square().sum((0, 1))  # torch.var takes five times as long
        variance = squares / max(1, given[..., 0].numel() - 1)
        errors.append((error / variance.clamp_min(1e-6)).mean())
    return torch.stack(errors).mean()


def _trunk(model: AdaptiveAttentionSystem) -> list[AdaptiveMambaBlock]:
    return cast("list[AdaptiveMambaBlock]", list(model.trunk))


def mean_ahead(values: Tensor, count: int) -> Tensor:
    """Mean of values [B, L] over each position and those after it, ``count`` in all or as many as there are."""
    sums = F.pad(values.double().cumsum(1), (1, 0))
    start = torch.arange(values.shape[1], device=values.device)
    end = (start + count).clamp_max(values.shape[1])
    return ((sums[:, end] - sums[:, start]) / (end - start)).to(values.dtype)


def clamped_bits(nats: Tensor) -> Tensor:
    """Costs in bits, bounded: a single byte may cost any number."""
    return (nats / math.log(2.0)).clamp(-8.0, 8.0)
