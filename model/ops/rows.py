"""Operations on a decoding batch whose rows do not depend, to the last bit, on how many rows there are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 4


def linear_rows(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for a decoding batch ``x`` [B, D] (weight [V, D]), the same bits for a row whatever its mates.

    CPU libraries pick another summation order for odd small batches (measured with torch 2.13: 1, 2, 3, 5, 6, 7, 9,
    10 and 11 rows differ in the last bit from 64 rows; 4, 8, 12 and more do not), and greedy text would then depend on
    the neighbours. Padding the rows to a multiple of four removes that.
    """
    missing = -x.shape[0] % _ROWS
    if missing == 0 or x.is_cuda:
        return F.linear(x, weight)
    return F.linear(F.pad(x, (0, 0, 0, missing)), weight)[: x.shape[0]]


def softplus_rows(x: Tensor) -> Tensor:
    """Softplus, the same bits for a value wherever it stands in a tensor.

    torch computes the last few elements of a tensor, those that fill no vector register, by another routine, and for
    ``F.softplus`` (and ``logaddexp``) that one rounds otherwise; for ``exp`` and ``log1p`` the two agree.
    """
    return torch.log1p(torch.exp(-x.abs())) + x.clamp_min(0.0)
