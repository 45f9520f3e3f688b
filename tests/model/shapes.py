"""Small models with weights at which nothing is at rest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import model.layers.mamba2
import model.lm
from model.adaptive.tiling import RATES
from model.config import ModelConfig
from model.lm import AdaptiveAttentionSystem
from model.ops.ssd import StepTrace
from model.state import ModelState

SMALL = ModelConfig(
    name="small",
    d_model=32,
    d_trunk=48,
    trunk_layers=2,
    headdim=16,
    d_state=16,
    d_state_levels=(4, 8, 16),
    chunk_size=16,
    max_tile_size=64,
    block_size=64,
    density_window=8,
    density_hidden=6,
)

UNMEASURED = SMALL.model_copy(update={"density_measured": False})
"""Its density is the learned feature alone."""

PROPAGATING = UNMEASURED.model_copy(update={"propagation_rank": 6, "window_size": 1, "inertia": 0.0})
"""The trunk's states read what the trunk skips, so that it may fire at single bytes."""

SHALLOW = PROPAGATING.model_copy(update={"trunk_layers": 3, "shallow_depths": (1, 2)})
"""The trunk may end after its first or second block: it has three stages."""

OWN_DECODERS = SHALLOW.model_copy(update={"own_decoders": True})
"""Each of its stages has a decoder of its own."""

_AT_REST = (
    "tile_exponent", "level_scale", "conv_bias", "D", "dt_bias", "inner_bias", "outer", "propagation.weight",
)  # fmt: skip


def random_model(config: ModelConfig = SMALL, seed: int = 0) -> AdaptiveAttentionSystem:
    """A model whose zero and one initialised parameters are moved as well, with thresholds that suit its densities."""
    torch.manual_seed(seed)
    model = AdaptiveAttentionSystem(config)
    with torch.no_grad():
        model.embedding.weight.mul_(25)
        for name, parameter in model.named_parameters():
            if name.endswith(("in_proj.weight", "out_proj.weight")):
                parameter.mul_(3)
                if name.startswith("later_decoders"):  # they begin alike
                    parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith(_AT_REST) or "fold" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        levels = torch.tensor([1.0 - rate for rate in RATES[:-1]]) * 0.98
        for depth in config.depths:
            _, tiles = model.placement(depth)
            density = model.analyse(random_tokens(1, 2048, seed), depth)
            thresholds = density.flatten().quantile(levels.double()).log()
            tiles.log_thresholds[:-1] = thresholds
            tiles.log_thresholds[-1] = thresholds[-1] - 9.0
            tiles.log_prices.copy_(tiles.log_thresholds)
            tiles.update_spread(density.numpy(), 1.0)
            tiles.log_tau.fill_(math.log(1.5))
    return model.eval().requires_grad_(False)


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Bytes [batch, length] with some structure: runs of letters between random bytes."""
    generator = torch.Generator().manual_seed(seed + 1000)
    noise = torch.randint(0, 256, (batch, length), generator=generator)
    letters = torch.randint(97, 101, (batch, length), generator=generator)
    runs = torch.rand(batch, length, generator=generator).cumsum(1).long() % 7 < 5
    return torch.where(runs, letters, noise)


def step_through(
    model: AdaptiveAttentionSystem,
    tokens: torch.Tensor,
    rates: torch.Tensor,
    d_state: int | None = None,
    depth: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, L, V] and fires [B, L] of reading tokens [B, L] one by one."""
    state = model.allocate_state(len(tokens), d_state=d_state, depth=depth)
    outputs = [model.step(column, state, rates) for column in tokens.unbind(1)]
    return torch.stack([o.logits for o in outputs], 1), torch.stack([o.fired for o in outputs], 1)


def settled(model: AdaptiveAttentionSystem, state: ModelState) -> ModelState:
    """The state once nothing waits to be read, for comparing: without codes, which may remain when they were read."""
    state = replace(state)
    model.settle(state)
    return replace(state, router=replace(state.router, codes=state.router.codes[:, :0]))


def encode_one(
    system: AdaptiveAttentionSystem, column: torch.Tensor, state: ModelState
) -> tuple[torch.Tensor, StepTrace]:
    """One position [B] through the encoder, whose state is advanced; its output and the last block's trace."""
    hidden, everyone = system.embedding(column), torch.arange(len(column))
    full = torch.full_like(everyone, SMALL.d_state)
    for block, block_state in zip(system.encoder, state.encoder, strict=True):
        hidden, trace = block.step(hidden, block_state, everyone, None, full)
    return hidden, trace


def without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what other devices run."""
    for module in (model.lm, model.layers.mamba2):
        monkeypatch.setattr(module, "compiled", lambda _: False)
    monkeypatch.setattr(model.layers.mamba2, "fused", lambda _: False)
