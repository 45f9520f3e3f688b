"""Choosing tokens from logits, each row by its own parameters and its own random numbers; and scoring them.

Draws are made by numpy: of a vocabulary of bytes, a call of torch takes longer than the work.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.sequence import Sequence, TokenScore

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def sample(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """One token per row of logits [B, V].

    Penalties come first. Greedy rows then take the first maximum. The others draw at their temperature: from the
    ``top_k`` most probable tokens, of these from those that have ``min_p`` of the best one's probability, and of these
    from the smallest set that holds ``top_p`` of what is left (Holtzman et al. 2020). They draw by inversion with one
    number from the sequence's own generator, so that the draw depends on nothing but the seed and the logits.
    """
    logits = _penalise(logits, sequences)
    drawing = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0.0]
    tokens: list[int] = [0] * len(sequences) if len(drawing) == len(sequences) else logits.argmax(-1).tolist()
    cut = [row for row in drawing if sequences[row].params.cut]
    whole = [row for row in drawing if not sequences[row].params.cut]
    for rows, draw in ((whole, _draw), (cut, _draw_cut)):
        if rows:
            drawn = draw(logits[rows], [sequences[row] for row in rows])
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    return tokens


def _probabilities(logits: Tensor, sequences: list[Sequence]) -> Floats:
    """[B, V] at each row's temperature."""
    scores: Floats = logits.double().cpu().numpy()
    # The maximum is taken off first: a tiny temperature must not overflow into a sum.
    with np.errstate(over="ignore"):
        scores = (scores - scores.max(-1, keepdims=True)) / _column([s.params.temperature for s in sequences])
    probability: Floats = np.exp(scores)
    probability /= probability.sum(-1, keepdims=True)
    return probability


def _invert(probability: Floats, sequences: list[Sequence]) -> Integers:
    """Positions [B] drawn from probabilities [B, V], which need not add up to 1."""
    total = probability.cumsum(-1)
    drawn: Integers = (total <= _column([s.random.random() for s in sequences]) * total[:, -1:]).sum(-1)
    return drawn


def _draw(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """A token per row from all there are; without a sort, which would take most of the time."""
    tokens: list[int] = _invert(_probabilities(logits, sequences), sequences).clip(max=logits.shape[-1] - 1).tolist()
    return tokens


def _draw_cut(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """A token per row from the most probable ones that its parameters keep."""
    chosen = [sequence.params for sequence in sequences]
    top_k = _column([params.top_k or logits.shape[-1] for params in chosen])
    probability = _probabilities(logits, sequences)
    index, rows = np.argsort(-probability, axis=-1, kind="stable"), np.arange(len(chosen))
    ordered = probability[rows[:, None], index]
    enough = ordered >= _column([params.min_p for params in chosen]) * ordered[:, :1]
    ordered *= enough & (np.arange(ordered.shape[-1]) < top_k)
    total = ordered.cumsum(-1)
    kept = ordered * (total - ordered < _column([params.top_p for params in chosen]) * total[:, -1:])
    # Rounding must not reach past the last kept token.
    drawn = np.minimum(_invert(kept, sequences), (kept > 0).sum(-1) - 1)
    tokens: list[int] = index[rows, drawn].tolist()
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


def _column(values: list[float]) -> Floats:
    return np.array(values, np.float64)[:, None]
