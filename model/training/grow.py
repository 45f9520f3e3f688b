"""A model that begins as a trained plain one: its blocks become encoder and decoder, around a trunk that adds nothing.

A plain model of the floor's operations reads several times as many bytes in the same time as the whole does, so that
much of the text can be read by it. Source: growing a network without changing what it computes, as in Net2Net (Chen et
al. 2016, section 2.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.training.faults import TrainingError

_OF_TRUNKS = ("tile_exponent", "level_scale")
"""What only a block of the trunk has: 0 and 1 where every byte fires at the full state."""


def grow(plain: AdaptiveAttentionSystem, config: ModelConfig) -> AdaptiveAttentionSystem:
    """A model of shape ``config`` that computes what ``plain`` does, at its floor and at full resolution alike.

    Raises:
        TrainingError: the blocks of ``plain`` are not as many, or not of the shape, of those outside the new trunk.
    """
    model = AdaptiveAttentionSystem(config)
    old = [*plain.encoder, *plain.trunk, *plain.decoder]
    new = [*model.encoder, *model.decoder]
    if len(old) != len(new):
        raise TrainingError(f"the model to grow has {len(old)} blocks, and encoder and decoder together {len(new)}")
    try:
        for source, target in zip(old, new, strict=True):
            weights = {name: value for name, value in source.state_dict().items() if not name.endswith(_OF_TRUNKS)}
            target.load_state_dict(weights)
        for name in ("embedding", "final_norm", *([] if config.tied_head else ["output"])):
            model.get_submodule(name).load_state_dict(plain.get_submodule(name).state_dict())
    except (RuntimeError, AttributeError) as error:
        raise TrainingError(f"the model to grow has another shape outside the trunk: {error}") from error
    for later in model.decoders()[1:]:
        later.load_state_dict(model.decoder.state_dict())
    with torch.no_grad():
        for parameter in _exits(model):
            parameter.zero_()
    return model


def _exits(model: AdaptiveAttentionSystem) -> list[Tensor]:
    """What the trunk's updates pass last: all of them are 0 if these are."""
    if model.router.up is not None:
        return [up.get_parameter("weight") for up in model.router.ups() if up is not None]
    return [block.get_parameter("mixer.out_proj.weight") for block in model.trunk]
