"""Choosing tokens from logits, each row by its own parameters and its own random numbers; and scoring them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.ops.draw import draw_rows
from service.engine.sequence import SamplingParams, Sequence, TokenScore


def sample(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """One token per row of logits [B, V].

    Penalties come first. Greedy rows then take the first maximum. The others draw at their temperature: from the
    ``top_k`` most probable tokens, of these from those that have ``min_p`` of the best one's probability, and of these
    from the smallest set that holds ``top_p`` of what is left (Holtzman et al. 2020). They draw by inversion with one
    number from the sequence's own generator, so that the draw depends on nothing but the seed and the logits.
    """
    logits = _penalise(logits, sequences)
    drawing = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0.0]
    if not drawing:
        return logits.argmax(-1).tolist()
    drawn = _draw(
        logits if len(drawing) == len(sequences) else logits[drawing],
        [sequences[row].params for row in drawing],
        [sequences[row].random.random() for row in drawing],
    )
    if len(drawing) == len(sequences):
        return drawn
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, token in zip(drawing, drawn, strict=True):
        tokens[row] = token
    return tokens


def warm_up_draws() -> None:
    """Draw once, so that compiling does not fall on a request."""
    _draw(torch.zeros(1, 2), [SamplingParams()], [0.0])


def _draw(logits: Tensor, params: list[SamplingParams], uniform: list[float]) -> list[int]:
    """A token per row of logits [B, V], each by its parameters and its number in [0, 1)."""
    size = logits.shape[-1]
    tokens: list[int] = draw_rows(
        logits.float().cpu().contiguous().numpy(),
        np.array([one.temperature for one in params], np.float64),
        np.array([one.top_k if one.top_k > 0 else size for one in params], np.int64),
        np.array([one.min_p for one in params], np.float64),
        np.array([one.top_p for one in params], np.float64),
        np.array(uniform, np.float64),
    ).tolist()
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
