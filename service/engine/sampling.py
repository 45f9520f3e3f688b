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
    drawing = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0.0]
    cut = [row for row in drawing if sequences[row].params.cut]
    whole = [row for row in drawing if not sequences[row].params.cut]
    for rows, draw in ((whole, _draw), (cut, _draw_cut)):
        if rows:
            drawn = draw(logits[rows], [sequences[row] for row in rows])
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    return tokens


def _probabilities(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """[B, V] float64, at each row's temperature."""
    # The maximum is taken off first: a tiny temperature must not overflow.
    scores = logits.double().cpu()
    temperature = _column([sequence.params.temperature for sequence in sequences])
    return ((scores - scores.amax(-1, keepdim=True)) / temperature).softmax(-1)


def _invert(probability: Tensor, sequences: list[Sequence]) -> Tensor:
    """Positions [B, 1] drawn from probabilities [B, V], which need not add up to 1."""
    total = probability.cumsum(-1)
    uniform = _column([sequence.random.random() for sequence in sequences])
    return torch.searchsorted(total, uniform * total[:, -1:], right=True)


def _draw(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """A token per row from all there are; without a sort, which would take most of the time."""
    drawn = _invert(_probabilities(logits, sequences), sequences)
    tokens: list[int] = drawn.clamp_max(logits.shape[-1] - 1).squeeze(-1).tolist()
    return tokens


def _draw_cut(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """A token per row from the most probable ones that its parameters keep."""
    chosen = [sequence.params for sequence in sequences]
    top_k = _column([params.top_k or logits.shape[-1] for params in chosen])
    ordered, index = _probabilities(logits, sequences).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1])
    enough = ordered >= _column([params.min_p for params in chosen]) * ordered[:, :1]
    ordered = torch.where((rank < top_k) & enough, ordered, 0.0)
    before = ordered.cumsum(-1) - ordered
    reached = _column([params.top_p for params in chosen]) * ordered.sum(-1, keepdim=True)
    kept = torch.where(before < reached, ordered, 0.0)
    # Rounding must not reach past the last kept token.
    drawn = _invert(kept, sequences).minimum((kept > 0).sum(-1, keepdim=True) - 1)
    tokens: list[int] = index.gather(-1, drawn).squeeze(-1).tolist()
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
