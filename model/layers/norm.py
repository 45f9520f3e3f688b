"""Root-mean-square normalisation."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops.parallel import loop_threads, share
from model.ops.recurrent import compiled, norm_rows

SHARED_FROM = 64
"""Positions from which a pass shares its compiled loops among threads: fewer are read faster by one."""


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
        return self._compiled(x) if compiled(x) else F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def _compiled(self, x: Tensor) -> Tensor:
        """The same by compiled loops; the bits do not depend on the number of threads."""
        rows, weight = x.reshape(-1, x.shape[-1]).numpy(), self.weight.detach().numpy()
        normal = np.empty_like(rows)

        def work(start: int, end: int) -> None:
            normal[start:end] = norm_rows(rows[start:end], weight, self.eps)

        share(work, len(rows), loop_threads() if len(rows) >= SHARED_FROM else 1)
        return torch.from_numpy(normal).view(x.shape)
