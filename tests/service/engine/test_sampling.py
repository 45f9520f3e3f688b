from __future__ import annotations

from collections import Counter

import pytest
import torch

from service.engine.budget import ComputeBudget, grant
from service.engine.sampling import sample
from service.engine.sequence import SamplingParams, Sequence
from tests.service.engine.fakes import COST

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 3.0, -1.0]])


def sequence(**params: object) -> Sequence:
    return Sequence([1], SamplingParams(**params), grant(ComputeBudget.exactly(1.0), COST), arrived=0.0)


def test_temperature_zero_takes_the_first_maximum() -> None:
    assert sample(LOGITS, [sequence(temperature=0.0)]) == [1]


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    assert set(sample(LOGITS.repeat(20, 1), [sequence(temperature=1e-300, seed=n) for n in range(20)])) <= {1, 3}


def test_draws_follow_the_distribution() -> None:
    count = 20_000
    probability = (LOGITS[0] / 0.8).softmax(-1)
    drawn = Counter(sample(LOGITS.repeat(count, 1), [sequence(temperature=0.8, seed=n) for n in range(count)]))
    for token, expected in enumerate(probability.tolist()):
        spread = (expected * (1 - expected) / count) ** 0.5
        assert abs(drawn[token] / count - expected) < 5 * spread


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probability = LOGITS[0].softmax(-1)  # ranked 1, 3, 2, 0, 4
    just = (probability[1] + probability[3]).item()
    rows = LOGITS.repeat(400, 1)
    below = set(sample(rows, [sequence(top_p=just - 1e-3, seed=n) for n in range(400)]))
    above = set(sample(rows, [sequence(top_p=just + 1e-3, seed=n) for n in range(400)]))
    assert below == {1, 3}
    assert above == {1, 2, 3}


def test_the_least_top_p_is_greedy() -> None:
    assert set(sample(LOGITS.repeat(50, 1), [sequence(top_p=1e-9, seed=n) for n in range(50)])) == {1}


@pytest.mark.parametrize("mates", [0, 1, 7])
def test_a_draw_depends_on_the_seed_alone_and_not_on_batch_mates(mates: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 257)
    one = sequence(seed=7, temperature=1.3, top_p=0.9)
    alone = [sample(logits[:1], [one])[0] for _ in range(30)]
    again = sequence(seed=7, temperature=1.3, top_p=0.9)
    others = [sequence(seed=n, temperature=n % 3 / 2) for n in range(mates)]
    together = [sample(logits[: mates + 1], [again, *others])[0] for _ in range(30)]
    assert together == alone
