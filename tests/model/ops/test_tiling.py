from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.references import brute_force, cost_of
from model.ops.tiling import (
    fire_evenly,
    fire_online,
    pacing_error,
    plan_block,
    plan_blocks,
    plan_sizes,
    staleness_table,
)


@given(
    st.lists(st.floats(0, 8), min_size=1, max_size=9),
    st.floats(0.01, 6),
    st.floats(0, 4),
    st.integers(0, 5),
    st.integers(1, 3),
    st.integers(0, 6),
    st.floats(0.3, 9),
)
def test_the_plan_is_as_cheap_as_the_best_of_all(
    values: list[float], price: float, entry: float, carry: int, least: int, more: int, tau: float
) -> None:
    density, table, sizes = np.array(values), staleness_table(tau, 64), (least, least + more)
    expected = brute_force(density, table, price, entry, carry, range(sizes[0], sizes[1] + 1))
    fires, tiles, cost = plan_block(density, table, price, entry, carry, *sizes)
    assert cost == pytest.approx(expected, abs=1e-9)
    assert tiles == fires.sum()
    assert cost_of(fires, density, table, price, entry, carry) == pytest.approx(cost, abs=1e-9)


@given(
    st.lists(st.floats(0, 8), min_size=1, max_size=9), st.floats(0.01, 6), st.floats(0, 4), st.integers(0, 9),
    st.sets(st.integers(1, 8), min_size=1), st.floats(0.3, 9),
)  # fmt: skip
def test_a_plan_with_any_set_of_sizes_is_as_cheap_as_the_best_of_all(
    values: list[float], price: float, entry: float, carry: int, sizes: set[int], tau: float
) -> None:
    density, table = np.array(values), staleness_table(tau, 64)
    fires, tiles, cost = plan_sizes(density, table, price, entry, carry, np.array(sorted(sizes)))
    assert cost == pytest.approx(brute_force(density, table, price, entry, carry, sizes), abs=1e-9)
    assert tiles == fires.sum()
    assert cost_of(fires, density, table, price, entry, carry) == pytest.approx(cost, abs=1e-9)
    full = plan_sizes(density, table, price, entry, carry, np.arange(min(sizes), max(sizes) + 1))
    assert full[2] == pytest.approx(
        plan_block(density, table, price, entry, carry, min(sizes), max(sizes))[2], abs=1e-9
    )


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 120), st.integers(1, 6), st.integers(0, 30), st.integers(0, 50),
    st.floats(0.05, 20), st.sampled_from([0.0, 0.05, 0.5, 5.0]), st.sampled_from([0.0, 0.1, 2.0]),
)  # fmt: skip
def test_dropping_starts_loses_nothing(
    seed: int, length: int, least: int, more: int, carry: int, tau: float, price: float, entry: float
) -> None:
    """The programme without dropping, too long for brute force; half of the bytes may cost nothing."""
    random = np.random.default_rng(seed)
    density = random.exponential(size=length) * (random.random(length) < random.random())
    table, most = staleness_table(tau, carry + length + 1), least + more
    best = [0.0] + [math.inf] * length
    total = math.inf
    for start in range(length + 1):
        age, loss = (0 if start else carry), best[start]
        for end in range(start + 1, length + 1):
            if age >= most and end > start + 1:
                break
            age += 1
            if age >= least:
                best[end] = min(best[end], loss + price + (entry if age > 1 else 0.0))
            loss += density[end - 1] * table[age]
        else:
            total = min(total, loss if age < most or start == length else math.inf)
    assert plan_block(density, table, price, entry, carry, least, most)[2] == pytest.approx(total, abs=1e-9)


def test_a_batch_of_blocks_is_planned_as_each_alone() -> None:
    random = np.random.default_rng(2)
    density, table = random.exponential(size=(6, 200)), staleness_table(3.0, 300)
    prices, carries = np.geomspace(0.01, 10, 6), np.array([0, 1, 5, 20, 64, 90])
    fires, tiles, costs = plan_blocks(density, table, prices, 0.3, carries, 2, 40)
    for row in range(6):
        alone = plan_block(density[row], table, prices[row], 0.3, carries[row], 2, 40)
        assert np.array_equal(fires[row], alone[0])
        assert (tiles[row], costs[row]) == alone[1:]


def test_a_higher_price_never_buys_more_tiles() -> None:
    density, table = np.random.default_rng(0).exponential(size=300), staleness_table(2.0, 400)
    counts = [plan_block(density, table, price, 0.0, 0, 1, 64)[1] for price in np.geomspace(0.01, 20, 30)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 200
    assert counts[-1] == 300 // 64


TEXTS = {
    "constant": np.full(4000, 0.5),
    "random": np.random.default_rng(1).exponential(size=4000),
    "spiky": np.where(np.arange(4000) % 37 == 0, 6.0, 0.01),
    "changing": np.concatenate([np.full(2000, 0.01), np.full(2000, 4.0)]),
}


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("log_threshold", [-6.0, 0.0, 3.0])
def test_online_firing_stays_near_its_quota_even_with_a_wrong_threshold(
    text: str, rate: float, log_threshold: float
) -> None:
    fires = fire_online(TEXTS[text], staleness_table(2.0, 64), rate, log_threshold, 0.5, 3.0, 0, 0, 0.0, 0, 1, 64)
    position = np.arange(1, 4001)
    error = [
        pacing_error(*each) for each in zip(np.cumsum(fires), rate * position, position, [rate] * 4000, strict=True)
    ]
    assert max(map(abs, error)) < 2.0


def test_online_firing_prefers_dense_bytes() -> None:
    fires = fire_online(TEXTS["spiky"], staleness_table(2.0, 64), 1 / 37, 0.0, 0.3, 3.0, 0, 0, 0.0, 0, 1, 64)
    assert fires[TEXTS["spiky"] > 1].mean() > 0.9
    assert fires[TEXTS["spiky"] < 1].mean() < 0.01


def test_rates_of_zero_and_one_leave_no_choice() -> None:
    table = staleness_table(2.0, 64)
    for rate in (0.0, 1.0):
        assert (fire_online(TEXTS["random"], table, rate, 0.0, 1.0, 3.0, 0, 0, 0.0, 0, 1, 64) == rate).all()


@given(st.floats(0.01, 1.0), st.integers(1, 500))
def test_even_firing_meets_its_count(rate: float, length: int) -> None:
    assert fire_evenly(rate, 0, 0.0, length).sum() == math.floor(rate * length + 1e-6)
