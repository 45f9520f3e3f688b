"""Choosing tokens from logits, each row by its own parameters and its own random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from service.engine.sequence import Sequence


def sample(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """One token per row of logits [B, V].

    Greedy rows take the first maximum. The others draw by inversion from the smallest set of most probable tokens that
    holds ``top_p`` (Holtzman et al. 2020), with one number from the sequence's own generator, so that the draw depends
    on nothing but the seed and the logits.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0.0]
    if not rows:
        return tokens
    chosen = [sequences[row] for row in rows]
    temperature = _column([sequence.params.temperature for sequence in chosen])
    top_p = _column([sequence.params.top_p for sequence in chosen])
    uniform = _column([sequence.random.random() for sequence in chosen])
    # The maximum is taken off first: a tiny temperature must not overflow.
    scores = logits[rows].double().cpu()
    probability = ((scores - scores.amax(-1, keepdim=True)) / temperature).softmax(-1)
    ordered, index = probability.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    total = kept.cumsum(-1)
    drawn = torch.searchsorted(total, uniform * total[:, -1:], right=True)
    drawn = drawn.minimum((kept > 0).sum(-1, keepdim=True) - 1)  # rounding must not reach past the last kept token
    for row, token in zip(rows, index.gather(-1, drawn).squeeze(-1).tolist(), strict=True):
        tokens[row] = token
    return tokens


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
