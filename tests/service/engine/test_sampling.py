from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
import torch

from service.engine.budget import ComputeBudget, grant
from service.engine.sampling import sample, score
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


def test_top_k_keeps_so_many_of_the_most_probable() -> None:
    rows = LOGITS.repeat(400, 1)
    assert set(sample(rows, [sequence(top_k=2, seed=n) for n in range(400)])) == {1, 3}
    assert set(sample(rows, [sequence(top_k=3, seed=n) for n in range(400)])) == {1, 2, 3}
    assert set(sample(rows, [sequence(top_k=1000, temperature=2.0, seed=n) for n in range(400)])) == {0, 1, 2, 3, 4}


def test_min_p_drops_what_is_less_probable_than_its_share_of_the_best() -> None:
    rows, share = LOGITS.repeat(400, 1), math.exp(-1.0)  # token 2 against tokens 1 and 3
    assert set(sample(rows, [sequence(min_p=share + 1e-6, seed=n) for n in range(400)])) == {1, 3}
    assert set(sample(rows, [sequence(min_p=share - 1e-6, seed=n) for n in range(400)])) == {1, 2, 3}


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    rows = LOGITS.repeat(400, 1)  # of tokens 1 and 3 each has half
    assert set(sample(rows, [sequence(top_k=2, top_p=0.49, seed=n) for n in range(400)])) == {1}
    assert set(sample(rows, [sequence(top_k=2, top_p=0.51, seed=n) for n in range(400)])) == {1, 3}


def draw_slowly(logits: list[float], params: SamplingParams, uniform: float) -> int:
    """One filter after the other, as the documentation says it."""
    weights = {token: math.exp((value - max(logits)) / params.temperature) for token, value in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: (-weights[token], token))
    left = ranked[: params.top_k] if params.top_k > 0 else ranked
    left = [token for token in left if weights[token] >= params.min_p * weights[ranked[0]]]
    if params.top_p < 1.0:
        sums = [sum(weights[token] for token in left[:count]) for count in range(len(left) + 1)]
        left = left[: next(count for count, total in enumerate(sums) if total >= params.top_p * sums[-1])]
    if len(left) == len(logits) and params.min_p == 0.0 and params.top_p == 1.0:
        left = sorted(left)  # nothing is ranked where nothing is cut
    wanted = uniform * sum(weights[token] for token in left)
    sums = [sum(weights[token] for token in left[: count + 1]) for count in range(len(left))]
    return next(token for token, total in zip(left, sums, strict=True) if total > wanted)


def test_draws_are_those_of_one_filter_after_the_other() -> None:
    random = Random(0)
    for _ in range(300):
        size = random.randint(1, 40)
        logits = [random.choice([-4.0, 0.0, 1.0, random.gauss(0, 3)]) for _ in range(size)]
        params = {
            "temperature": random.choice([0.3, 1.0, 1.7]),
            "top_k": random.choice([0, 0, -1, 1, 5, 100]),
            "min_p": random.choice([0.0, 0.0, 0.05, 0.5]),
            "top_p": random.choice([1.0, 1.0, 0.3, 0.9]),
        }
        seed = random.randrange(1000)
        rows = torch.tensor([logits], dtype=torch.float64).float()
        expected = draw_slowly(rows[0].tolist(), SamplingParams(**params), sequence(seed=seed).random.random())
        assert sample(rows, [sequence(seed=seed, **params)]) == [expected]


def said(**params: object) -> Sequence:
    """A greedy sequence with token 2 in its prompt that has generated token 1 twice and token 0 once."""
    given = grant(ComputeBudget.exactly(1.0), COST)
    one = Sequence([256, 2], SamplingParams(temperature=0.0, **params), given, arrived=0.0)
    for token in (1, 1, 0):
        one.accept(token)
    return one


@pytest.mark.parametrize(
    ("params", "logits", "expected"),
    [
        ({"presence_penalty": 0.5}, [0.0, 3.0, 0.0, 2.4], 1),
        ({"presence_penalty": 0.7}, [0.0, 3.0, 0.0, 2.4], 3),
        ({"frequency_penalty": 0.25}, [0.0, 3.0, 0.0, 2.4], 1),
        ({"frequency_penalty": 0.35}, [0.0, 3.0, 0.0, 2.4], 3),
        ({"frequency_penalty": 2.0}, [0.0, 0.0, 3.0, 2.4], 2),  # the prompt does not count
        ({"repetition_penalty": 1.2}, [0.0, 0.0, 3.0, 2.6], 3),  # here it does
        ({"repetition_penalty": 1.1}, [0.0, 0.0, 3.0, 2.6], 2),
        ({"repetition_penalty": 2.0}, [-1.0, -9.0, -9.0, -1.5], 3),  # a negative logit falls
        ({"presence_penalty": -2.0}, [0.0, 1.0, 0.0, 2.0], 1),
    ],
)
def test_penalties_follow_what_was_said(params: dict[str, float], logits: list[float], expected: int) -> None:
    rows = torch.tensor([logits, logits])
    before = rows.clone()
    assert sample(rows, [said(**params), said()]) == [expected, max(range(4), key=lambda token: logits[token])]
    assert torch.equal(rows, before), "the mate's row and the reported scores are those of the model"


def test_scores_are_log_probabilities_with_the_best_tokens() -> None:
    expected = LOGITS[0].double().log_softmax(-1).tolist()
    first, second = score(LOGITS.repeat(2, 1), [2, 1], [3, 0])
    assert (first.token, first.logprob) == (2, pytest.approx(expected[2]))
    assert [token for token, _ in first.top] == [1, 3, 2]
    assert first.top[2][1] == first.logprob
    assert (second.logprob, second.top) == (pytest.approx(expected[1]), [])
    assert score(LOGITS[:0], [], []) == []
