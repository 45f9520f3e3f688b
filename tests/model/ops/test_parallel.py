"""Sharing work among threads."""

from __future__ import annotations

import torch

from model.ops.parallel import own_threads, set_loop_threads, share
from tests.model.shapes import SMALL, random_model


def test_a_pass_has_the_same_bits_on_any_number_of_threads() -> None:
    block, results = random_model().trunk[0], []
    torch.manual_seed(0)
    hidden = torch.randn(2, 700, SMALL.d_trunk)
    for threads in (1, 2, 3, 100):
        set_loop_threads(threads)
        with torch.no_grad():
            output, after, trace = block(hidden, block.mixer.zero_state(2, hidden.device))
        assert trace is not None
        results.append([output, *after.tensors(), trace.x, trace.dt, trace.B, trace.C, trace.before])
    set_loop_threads(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_torch_keeps_to_one_thread_while_ours_share() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside: list[int] = []
        with own_threads():
            inside.append(torch.get_num_threads())
            share(lambda start, _: inside.append(torch.get_num_threads() + start), 2, 2)
        assert sorted(inside) == [1, 1, 2]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
