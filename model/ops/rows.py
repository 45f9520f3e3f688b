"""Whole rows of batches."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """[B, K, ...] of values [B, L, ...] at index [B, K]: row by row, where gather would copy number by number."""
    first = torch.arange(len(values), device=index.device).unsqueeze(1) * values.shape[1]
    taken: Tensor = values.flatten(0, 1).index_select(0, (first + index).flatten())
    return taken.view(*index.shape, *values.shape[2:])
