"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops.fused import fused, rms_norm


class RMSNorm(nn.Module):
    """RMS normalisation over the last axis (Zhang and Sennrich 2019), optionally gated as in Mamba-2."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise ``x`` or, with a gate of the same shape, ``x * silu(gate)``."""
        if gate is not None:
            x = x * F.silu(gate)
        if torch.is_grad_enabled() and fused(x):
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
