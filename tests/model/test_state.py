from __future__ import annotations

import copy

import torch

from model.state import ModelState
from tests.model.shapes import random_model


def filled(batch: int) -> ModelState:
    state = random_model().allocate_state(batch)
    torch.manual_seed(batch)
    for tensor in state.tensors():
        tensor.copy_(torch.randint(1, 9, tensor.shape))
    return state


def equal(one: ModelState, other: ModelState) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_rows_go_out_and_back() -> None:
    state, index = filled(5), torch.tensor([3, 1])
    rows, copy = state.gather(index), state.map(torch.clone)
    state.scatter_(index, random_model().allocate_state(2))
    assert not equal(state, copy)
    state.scatter_(index, rows)
    assert equal(state, copy)


def test_rows_join_in_order() -> None:
    state = filled(4)
    parts = [state.gather(torch.tensor(rows)) for rows in ([0], [1, 2], [3])]
    assert equal(ModelState.concatenate(parts), state)


def test_bytes_are_those_of_every_row() -> None:
    assert filled(6).nbytes == 6 * filled(1).nbytes


def test_arrays_show_the_tensors_of_their_own_state() -> None:
    block = filled(2).trunk[0]
    block.arrays()[1][0] = 7.0
    assert (block.ssm_state[0] == 7.0).all()
    other = copy.deepcopy(block)
    other.arrays()[1][0] = 8.0
    assert (other.ssm_state[0] == 8.0).all()
    assert (block.arrays()[1][0] == 7.0).all()
