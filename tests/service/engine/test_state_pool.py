from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.engine.state_pool import StatePool
from tests.service.servers import TINY, tiny_model

SMALL, *_, WHOLE = TINY.d_state_levels
MODEL = tiny_model()


@pytest.fixture
def pool() -> StatePool:
    pool = StatePool(tiny_model())
    for slot in range(3):
        mark(pool, slot)
    return pool


def mark(pool: StatePool, slot: int) -> None:
    """Begin a state that can be told from others."""
    pool.alone(slot, WHOLE).router.positions.fill_(slot + 10)


def rows(pool: StatePool, columns: int = WHOLE) -> dict[int, int]:
    """Marks by slot of the states that generate."""
    parts = [part for arena in pool.arenas for part in arena.parts(arena.slots, 1)]
    return {
        slot: position
        for part in parts
        if set(part.states.columns.tolist()) == {columns}
        for slot, position in zip(part.slots, part.states.router.positions.tolist(), strict=True)
    }


def test_rows_follow_their_slots_as_sequences_join_and_leave(pool: StatePool) -> None:
    for slot in (2, 0, 1):
        pool.join(slot)
    assert rows(pool) == {2: 12, 0: 10, 1: 11}
    pool.release(2)
    pool.check_integrity()
    assert rows(pool) == {1: 11, 0: 10}
    mark(pool, 2)
    pool.join(2)
    assert rows(pool) == {1: 11, 0: 10, 2: 12}
    pool.check_integrity()


def test_an_unchanged_arena_gives_the_same_rows_and_joining_again_changes_nothing(pool: StatePool) -> None:
    pool.join(0)
    parts = pool.arenas[0].parts([0], 1)
    pool.join(0)
    assert pool.arenas[0].parts([0], 1) is parts


@pytest.mark.parametrize(
    ("rows_held", "most", "sizes"), [(3, 2, [3]), (8, 2, [4, 4]), (9, 2, [4, 5]), (13, 4, [4, 4, 5])]
)
def test_an_arena_comes_apart_into_equal_parts(rows_held: int, most: int, sizes: list[int]) -> None:
    pool = StatePool(MODEL)
    for slot in range(rows_held):
        mark(pool, slot)
        pool.join(slot)
    parts = pool.arenas[0].parts(range(rows_held), most)
    assert [len(part.slots) for part in parts] == sizes
    assert all(part.rows is None for part in parts)
    for part in parts:
        part.states.router.positions.add_(5)
    assert rows(pool) == {slot: slot + 15 for slot in range(rows_held)}


def test_a_slot_keeps_its_depth_wherever_its_state_is() -> None:
    model = tiny_model(
        config=TINY.model_copy(update={"shallow_depths": (1,), "density_measured": False, "density_hidden": 8})
    )
    pool = StatePool(model)
    mark(pool, 0)
    mark(pool, 1)
    pool.set_depth(0, 1)
    assert pool.alone(0, WHOLE).depth.tolist() == [1]
    pool.join(0)
    pool.join(1)
    pool.set_depth(1, 1)
    pool.set_depth(0, None)
    pool.check_integrity()
    assert (rows(pool), pool.arenas[0].depths) == ({0: 10, 1: 11}, [1, 2])
    pool.resize(1, SMALL)
    pool.check_integrity()
    assert [arena.depths for arena in pool.arenas] == [[2], [1]]
    pool.put(2, model.allocate_state(1, depth=1))
    pool.check_integrity()
    for slot in range(3):
        pool.release(slot)
    pool.check_integrity()


def test_what_a_step_writes_is_in_the_buffer(pool: StatePool) -> None:
    pool.join(0)
    pool.join(1)
    pool.arenas[0].parts(pool.arenas[0].slots, 1)[0].states.router.positions.add_(5)
    pool.join(2)
    assert rows(pool) == {0: 15, 1: 16, 2: 12}


def test_some_of_an_arena_are_rows_of_its_buffer() -> None:
    pool = StatePool(MODEL)
    for slot in range(12):
        mark(pool, slot)
        pool.join(slot)
    pool.release(3)
    parts = pool.arenas[0].parts({0, 2, 11, 5, 99, 7, 8, 9, 10}, 2)
    assert [part.slots for part in parts] == [[0, 2, 11, 5], [7, 8, 9, 10]]
    for part in parts:
        assert part.rows is not None
        assert part.states.router.positions[part.rows].tolist() == [slot + 10 for slot in part.slots]


def test_a_slot_starts_again_from_nothing(pool: StatePool) -> None:
    pool.join(1)
    pool.release(1)
    fresh = tiny_model().allocate_state(1)
    assert all(
        torch.equal(mine, new) for mine, new in zip(pool.alone(1, WHOLE).tensors(), fresh.tensors(), strict=True)
    )


def test_bytes_follow_what_is_held(pool: StatePool) -> None:
    assert pool.sizes[WHOLE] == sum(t.numel() * t.element_size() for t in pool.alone(0, WHOLE).tensors())
    assert pool.sizes[SMALL] < pool.sizes[WHOLE]
    assert pool.used_bytes == 3 * pool.sizes[WHOLE]
    pool.join(0)
    pool.keep_end("prompt", 1, None)
    assert pool.used_bytes == 4 * pool.sizes[WHOLE]
    pool.resize(0, SMALL)
    pool.resize(2, SMALL)
    assert pool.used_bytes == 2 * pool.sizes[WHOLE] + 2 * pool.sizes[SMALL]
    pool.drop_end("prompt")
    for slot in range(3):
        pool.release(slot)
    assert pool.used_bytes == 0
    pool.check_integrity()


def test_resizing_moves_a_row_and_changes_it_as_the_model_does(pool: StatePool) -> None:
    generator = torch.Generator().manual_seed(0)
    for block in pool.alone(0, WHOLE).trunk:
        block.ssm_state.normal_(generator=generator)
    expected = pool.alone(0, WHOLE).map(torch.clone)
    tiny_model().resize_state_space(expected, SMALL)
    for slot in range(3):
        pool.join(slot)
    pool.resize(0, SMALL)
    pool.check_integrity()
    assert rows(pool) == {2: 12, 1: 11}
    assert rows(pool, SMALL) == {0: 10}
    (arena,) = [arena for arena in pool.arenas if arena.slots == [0]]
    (part,) = arena.parts([0], 1)
    assert all(torch.equal(a, b) for a, b in zip(part.states.tensors(), expected.tensors(), strict=True))


def test_the_end_of_a_prompt_is_not_changed_by_those_who_start_there(pool: StatePool) -> None:
    pool.keep_end("prompt", 0, torch.zeros(3))
    pool.join(0)
    pool.arenas[0].parts(pool.arenas[0].slots, 1)[0].states.router.positions.add_(5)
    pool.put(7, pool.end("prompt").state)
    pool.join(7)
    pool.arenas[0].parts(pool.arenas[0].slots, 1)[0].states.router.positions.add_(5)
    pool.put(8, pool.end("prompt").state)
    pool.join(8)
    assert rows(pool) == {0: 20, 7: 15, 8: 10}


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["join", "release", "shrink"])), max_size=60))
def test_buffers_follow_random_use(work: list[tuple[int, str]]) -> None:
    pool, expected = StatePool(MODEL), {}
    for slot, action in work:
        if action == "join":
            if slot not in expected:
                mark(pool, slot)
            pool.join(slot)
            expected.setdefault(slot, WHOLE)
        elif action == "release":
            pool.release(slot)
            expected.pop(slot, None)
        elif slot in expected:
            pool.resize(slot, SMALL)
            expected[slot] = SMALL
        pool.check_integrity()
        assert rows(pool) | rows(pool, SMALL) == {slot: slot + 10 for slot in expected}
        assert pool.used_bytes == sum(pool.sizes[columns] for columns in expected.values())
    for slot in expected:
        pool.release(slot)
    assert pool.buffer_bytes <= 16 * (pool.sizes[WHOLE] + pool.sizes[SMALL])
