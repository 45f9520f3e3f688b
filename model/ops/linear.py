"""Matrix products whose rows do not depend on how many rows there are."""

from __future__ import annotations

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
