from __future__ import annotations

import numpy as np
import pytest

from model.evaluation.bootstrap import NOTHING, Bootstrap


def test_two_documents_have_three_samples() -> None:
    bits, sizes = np.array([[8.0, 4.0], [3.0, 2.0]]), np.array([4, 1])
    bootstrap = Bootstrap(bits, sizes, resamples=4000)
    assert bootstrap.columns.tolist() == [[11 / 5, 6 / 5]]
    found, counts = np.unique(bootstrap.samples, axis=0, return_counts=True)
    # The first twice, each once, the second twice: by chance 1/4, 1/2, 1/4.
    assert found.tolist() == [[2.0, 1.0], [2.2, 1.2], [3.0, 2.0]]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    estimate = bootstrap.estimate(lambda columns: columns[:, 0] - columns[:, 1])
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(1.0),) * 3
    estimate = bootstrap.estimate(lambda columns: columns[:, 0])
    assert estimate.as_dict() == {"value": 2.2, "interval": [2.0, 3.0]}
    assert estimate.plus(1.0).as_dict() == {"value": 3.2, "interval": [3.0, 4.0]}


def test_the_same_seed_draws_the_same_documents() -> None:
    bits, sizes = np.random.default_rng(0).random((20, 3)), np.full(20, 7)
    one, two, other = (Bootstrap(bits, sizes, resamples=600, seed=seed).samples for seed in (1, 1, 2))
    assert one.shape == (600, 3)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random, covered, runs, documents = np.random.default_rng(3), 0, 300, 60
    for seed in range(runs):
        sizes = random.lognormal(8.0, 1.0, documents).astype(np.int64) + 1
        level = 2.0 + 0.3 * random.standard_normal(documents)  # a document's own difficulty, common to both columns
        lost = 0.05 + 0.02 * random.standard_normal(documents)
        bits = np.stack([level * sizes, (level + lost) * sizes], axis=1)
        estimate = Bootstrap(bits, sizes, resamples=400, seed=seed).estimate(lambda x: x[:, 1] - x[:, 0])
        covered += estimate.low <= 0.05 <= estimate.high
    assert 0.88 <= covered / runs <= 0.98


def test_pairing_makes_the_interval_of_a_difference_narrow() -> None:
    random = np.random.default_rng(4)
    level, sizes = 2.0 + 0.3 * random.standard_normal(50), np.full(50, 100)
    bootstrap = Bootstrap(np.stack([level * 100, (level + 0.05) * 100], axis=1), sizes, resamples=500)
    difference, alone = (bootstrap.estimate(f) for f in (lambda x: x[:, 1] - x[:, 0], lambda x: x[:, 0]))
    assert difference.high - difference.low < 1e-9 < 0.05 < alone.high - alone.low


def test_what_cannot_be_told_is_not_told() -> None:
    single = Bootstrap(np.array([[8.0]]), np.array([4]), resamples=10).estimate(lambda x: x[:, 0])
    assert single.as_dict() == {"value": 2.0, "interval": None}
    assert NOTHING.as_dict() == {"value": None, "interval": None}
    with pytest.raises(ValueError, match="at least one document"):
        Bootstrap(np.zeros((0, 1)), np.zeros(0, np.int64))
