"""Optimiser: Muon for the matrices, AdamW for everything else.

Source: ``AdaptiveOptimizer.optimize_step``, section 4.5.2 of the source document, and Jordan et al. 2024 for Muon.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from model.lm import AdaptiveAttentionSystem
from model.ops.products import multiplies_bf16, products
from model.training.config import TrainingConfig
from model.training.distributed import ALONE, Ranks
from model.training.firing import Reduced
from model.training.loss import compute_loss
from model.training.muon import Muon


@dataclass(frozen=True, slots=True)
class Step:
    """What one training step saw."""

    bits: dict[str, float]
    """Bits per byte by pass, over this process's texts."""
    gradient_norm: float
    """Before clipping, of all processes together."""
    learning_rate: float


class AdaptiveOptimizer:
    """Steps a model at a given resolution.

    Args:
        model: its parameters are changed in place. config: learning rate and its schedule, clipping, weight decay,
            precision, checkpointing. ranks: the processes that take each step together.

    Raises:
        ValueError: mixed precision without a GPU, or on a CPU that has no units for it.
    """

    def __init__(self, model: AdaptiveAttentionSystem, config: TrainingConfig, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.config = config
        self.ranks = ranks
        device = model.device.type
        on_cpu, low = device == "cpu", config.precision != "fp32"
        if on_cpu and low and not (config.precision == "bf16" and multiplies_bf16()):
            expected = "'fp32', or 'bf16'" if multiplies_bf16() else "'fp32'"
            raise ValueError(f"precision = {config.precision!r} needs a GPU; on this CPU it must be {expected}")
        model.gradient_checkpointing = config.checkpointing
        dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
        # A CPU's products take fp32 and round it on the way in, so that the compiled loops between them go on.
        self.mixed = partial(torch.autocast, device, dtype=dtype, enabled=low and not on_cpu)
        self.products = partial(products, "medium") if on_cpu and low else nullcontext
        self.scaler = torch.amp.GradScaler(device, enabled=config.precision == "fp16")
        matrices, decayed, kept, density = [], [], [], []
        for name, parameter in model.named_parameters():
            if name.startswith(("density.", "tiles.", "later_density.", "later_tiles.")):
                density.append(parameter)
            elif name.startswith(("router.shallow_up.", "router.later_codes.")) or name.endswith(
                ("in_proj.weight", "out_proj.weight", "propagation.weight", "down.weight", "up.weight", "code.weight")
            ):
                matrices.append(parameter)
            elif parameter.dim() >= 2:
                decayed.append(parameter)
            else:  # A_log, dt_bias, D, norms, fading: decay would pull them towards a meaningless zero
                kept.append(parameter)
        rate, decay = config.learning_rate, config.weight_decay
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=rate, weight_decay=decay, ranks=ranks),
            AdamW(
                [
                    {"params": decayed, "weight_decay": decay},
                    {"params": kept, "weight_decay": 0.0},
                    {"params": density, "weight_decay": 0.0, "lr": 3 * rate},
                ],
                lr=rate,
                betas=(0.9, 0.95),
            ),
        ]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]

    def schedule(self, step: int) -> float:
        """Share of the peak learning rate at ``step``: linear warm-up, constant, then a straight line to 1 %.

        The constant part lets a resumed run move its end (Hägele et al. 2024, "Scaling laws beyond fixed durations").
        """
        warm = min(1.0, (step + 1) / max(1, self.config.warmup))
        left = (self.config.steps - step) / max(1.0, self.config.cooldown * self.config.steps)
        return warm * min(1.0, max(0.01, left))

    def optimize_step(self, tokens: Tensor, reduced: Reduced | None, step: int) -> Step:
        """One training step on tokens [B, L + 1], this process's, at the sampled resolution.

        Raises:
            FloatingPointError: the loss or the gradient is not finite, on any process; the parameters are unchanged.
        """
        with self.products():
            return self._step(tokens, reduced, step)

    def _step(self, tokens: Tensor, reduced: Reduced | None, step: int) -> Step:
        with self.mixed():
            loss = compute_loss(self.model, tokens, reduced, self.config)
        seen = f"loss {loss.total.item():.4g} (bits per byte: {_listed(loss.bits)})"
        if not self.ranks.mean(loss.total).isfinite():
            raise FloatingPointError(f"the loss is not finite in step {step + 1}: {seen}")
        self.scaler.scale(loss.total).backward()
        self.ranks.average_gradients(self.model.parameters())
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        overflown = not norm.isfinite()
        if overflown and not self.scaler.is_enabled():  # a loss scale is halved instead, nothing else moves
            raise FloatingPointError(f"the gradient's norm is {norm.item()} in step {step + 1}: {seen}")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.schedule(step)
            if not overflown:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return Step(loss.bits, norm.item(), self.config.learning_rate * self.schedule(step))

    def state_dict(self) -> list[dict[str, Any]]:
        """State of both optimisers, and of the loss scale."""
        return [*(optimizer.state_dict() for optimizer in self.optimizers), self.scaler.state_dict()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for optimizer, state in zip(self.optimizers, states[:-1], strict=True):
            optimizer.load_state_dict(state)
        self.scaler.load_state_dict(states[-1])


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
