"""The training loss: full and reduced resolution on the same bytes.

Source: ``compute_loss``, section 4.5.1 of the source document: task loss + compute + information preservation. The
compute term is not a penalty here: the firing rule meets the sampled rate by construction, so its gradient is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.lm import AdaptiveAttentionSystem
from model.training.config import TrainingConfig
from model.training.firing import Reduced, choose_fires


@dataclass(slots=True)
class Loss:
    """A loss to differentiate, and what to show of it."""

    total: Tensor
    bits: dict[str, float] = field(default_factory=dict)
    """Bits per byte by pass."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats [B, L] of logits [B, L, V]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def compute_loss(
    model: AdaptiveAttentionSystem, tokens: Tensor, reduced: Reduced | None, config: TrainingConfig
) -> Loss:
    """Loss of one batch of tokens [B, L + 1]; ``reduced`` None trains the full resolution alone."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    state = model.allocate_state(len(tokens))
    encoded = model.encode(inputs, state.encoder)
    full_logits = model.head(model.combine(encoded.hidden, None, state))
    full = cross_entropy(full_logits, targets)
    loss = Loss(full.mean(), {"full": full.mean().item() / math.log(2.0)})
    if reduced is None:
        return loss

    exit_logits = model.exit_head(encoded.hidden)
    exit_loss = cross_entropy(exit_logits, targets).mean()
    state = model.allocate_state(len(tokens), d_state=reduced.d_state)
    features, analysed = model.density(exit_logits.detach(), encoded.trace, state.density)
    if model.training:
        model.density.update_statistics(features, reduced.momentum)
    density = model.density.combine(features)
    smoothed = model.density.smooth(density.detach(), state.density, analysed)
    if model.training:
        model.tiles.update_spread(smoothed, reduced.momentum)
    fires = torch.from_numpy(choose_fires(model.tiles, smoothed, reduced)).to(inputs.device)
    logits = model.head(model.combine(encoded.hidden, fires, state))
    cost = cross_entropy(logits, targets)
    # One sequence is enough for the divergence: it is an average over thousands of positions already.
    divergence = (
        F.kl_div(logits[:1].log_softmax(-1), full_logits[:1].detach().log_softmax(-1), log_target=True, reduction="sum")
        / logits[:1, :, 0].numel()
    )
    regression = density_regression(model, density, cost.detach() - full.detach(), fires)
    weight = config.full_weight
    loss.total = (
        weight * full.mean()
        + (1.0 - weight) * cost.mean()
        + config.exit_weight * exit_loss
        + config.kl_weight * divergence
        + config.density_weight * regression
    )
    loss.bits["exit"] = exit_loss.item() / math.log(2.0)
    loss.bits["floor" if reduced.rate == 0 else "reduced"] = cost.mean().item() / math.log(2.0)
    return loss


def density_regression(model: AdaptiveAttentionSystem, density: Tensor, stale_cost: Tensor, fires: Tensor) -> Tensor:
    """Mean squared error in bits² of ``density * staleness(age)`` against what staleness did cost.

    Args:
        density: [B, L] bits, differentiable. stale_cost: [B, L] nats lost by the reduced pass. fires: [B, L] bool.
    """
    position = torch.arange(1, fires.shape[1] + 1, device=fires.device)
    age = position - torch.where(fires, position, 0).cummax(1).values
    predicted = density * model.tiles.staleness(age)
    return (predicted - (stale_cost / math.log(2.0)).clamp(-8.0, 8.0)).square().mean()
