"""Choosing tokens from logits, each row by its own parameters and its own random numbers; and scoring them."""

from __future__ import annotations

import torch
from torch import Tensor

from service.engine.sequence import Sequence, TokenScore


def sample(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """One token per row of logits [B, V].

    Penalties come first. Greedy rows then take the first maximum. The others draw at their temperature: from the
    ``top_k`` most probable tokens, of these from those that have ``min_p`` of the best one's probability, and of these
    from the smallest set that holds ``top_p`` of what is left (Holtzman et al. 2020). They draw by inversion with one
    number from the sequence's own generator, so that the draw depends on nothing but the seed and the logits.
    """
    logits = _penalise(logits, sequences)
    tokens: list[int] = logits.argmax(-1).tolist()
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0.0]
    if not rows:
        return tokens
    chosen = [sequences[row].params for row in rows]
    temperature = _column([params.temperature for params in chosen])
    top_k = _column([params.top_k or logits.shape[-1] for params in chosen])
    uniform = _column([sequences[row].random.random() for row in rows])
    # The maximum is taken off first: a tiny temperature must not overflow.
    scores = logits[rows].double().cpu()
    probability = ((scores - scores.amax(-1, keepdim=True)) / temperature).softmax(-1)
    ordered, index = probability.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1])
    enough = ordered >= _column([params.min_p for params in chosen]) * ordered[:, :1]
    ordered = torch.where((rank < top_k) & enough, ordered, 0.0)
    before = ordered.cumsum(-1) - ordered
    reached = _column([params.top_p for params in chosen]) * ordered.sum(-1, keepdim=True)
    kept = torch.where(before < reached, ordered, 0.0)
    total = kept.cumsum(-1)
    drawn = torch.searchsorted(total, uniform * total[:, -1:], right=True)
    drawn = drawn.minimum((kept > 0).sum(-1, keepdim=True) - 1)  # rounding must not reach past the last kept token
    for row, token in zip(rows, index.gather(-1, drawn).squeeze(-1).tolist(), strict=True):
        tokens[row] = token
    return tokens


def score(logits: Tensor, tokens: list[int], counts: list[int]) -> list[TokenScore]:
    """Scores of one token per row of logits [B, V], each with so many of the most probable tokens."""
    if not tokens:
        return []
    log_p = logits.double().cpu().log_softmax(-1)
    chosen = log_p.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1).tolist()
    ordered, index = log_p.sort(dim=-1, descending=True, stable=True)
    most = max(counts)
    best = zip(index[:, :most].tolist(), ordered[:, :most].tolist(), strict=True)
    return [
        TokenScore(token, logprob, list(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, count, (ids, values) in zip(tokens, chosen, counts, best, strict=True)
    ]


def _penalise(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """The logits after the penalties of each row; a copy if there are any."""
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.penalised]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        params = sequences[row].params
        if sequences[row].said:
            said = sorted(sequences[row].said)
            values = logits[row, said]
            factor = params.repetition_penalty
            logits[row, said] = torch.where(values > 0, values / factor, values * factor)
        if sequences[row].counts:
            index = list(sequences[row].counts)
            counts = torch.tensor([*sequences[row].counts.values()], dtype=logits.dtype, device=logits.device)
            logits[row, index] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
