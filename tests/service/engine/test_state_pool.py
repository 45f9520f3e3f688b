from __future__ import annotations

import pytest
import torch

from service.engine.state_pool import StatePool
from tests.service.servers import tiny_model


@pytest.fixture
def pool() -> StatePool:
    pool = StatePool(tiny_model())
    for slot in range(3):
        pool.alone(slot).router.positions.fill_(slot + 10)
    return pool


def positions(pool: StatePool, slots: list[int]) -> list[int]:
    return pool.batch(slots).router.positions.tolist()


def test_rows_follow_their_slots_as_sequences_join_and_leave(pool: StatePool) -> None:
    assert positions(pool, [2]) == [12]
    assert positions(pool, [2, 0, 1]) == [12, 10, 11]
    pool.check_integrity()
    pool.release(0)
    assert positions(pool, [2, 1]) == [12, 11]
    pool.check_integrity()


def test_an_unchanged_batch_is_not_copied(pool: StatePool) -> None:
    assert pool.batch([0, 1]) is pool.batch([0, 1])


def test_a_slot_starts_again_from_nothing(pool: StatePool) -> None:
    pool.release(1)
    fresh = tiny_model().allocate_state(1)
    assert all(torch.equal(mine, new) for mine, new in zip(pool.alone(1).tensors(), fresh.tensors(), strict=True))


def test_bytes_follow_the_slots_that_are_held(pool: StatePool) -> None:
    assert pool.nbytes == 3 * pool.bytes_per_sequence
    pool.batch([0, 1])
    for slot in range(3):
        pool.release(slot)
    assert pool.nbytes == 0
    pool.check_integrity()


def test_bytes_per_sequence_are_those_of_its_tensors(pool: StatePool) -> None:
    assert pool.bytes_per_sequence == sum(t.numel() * t.element_size() for t in pool.alone(0).tensors())
    assert pool.alone(0).encoder[0].ssm_state.dtype is torch.float32
