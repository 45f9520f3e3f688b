"""Reading of bytes at which a block is not run: what stands in for their inputs in its convolution and its state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.ops.rows import take_rows


@dataclass(frozen=True, slots=True)
class Propagated:
    """L bytes of which a block is run at K, and reads the codes of the others.

    A byte that is read so costs no projection of its own width, has no output, and is written into the columns of the
    smallest state only; all columns decay.
    """

    codes: Tensor
    """[B, L, r]."""
    fires: Tensor
    """[B, L] bool: where the block is run."""
    places: Tensor
    """[B, K] int64: the positions where it is; those beyond a row's own number stand for padding."""

    def spread(self, ran: Tensor, read: Tensor) -> Tensor:
        """[B, L, C]: of ``ran`` [B, K, C] where the block is run, of ``read`` [B, L, C] elsewhere."""
        if not ran.shape[1]:
            return read
        return take_rows(ran, (self.fires.cumsum(1) - 1).clamp_min(0)).where(self.fires.unsqueeze(-1), read)

    def select(self, values: Tensor) -> Tensor:
        """[B, K, ...] of [B, L, ...] where the block is run."""
        return take_rows(values, self.places)
