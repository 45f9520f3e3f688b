"""A step of few rows with the help of another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import model.decoding
from model.ops.parallel import Helper, own_threads, set_loop_threads, share
from model.ops.recurrent import help_rows
from tests.model.shapes import SMALL, random_model, random_tokens, step_through

RATES = [1.0, 0.5]


@pytest.fixture
def two_threads() -> Iterator[None]:
    set_loop_threads(2)
    yield
    set_loop_threads(0)


class Counting(Helper):
    """Does what it is asked for, and counts it."""

    def __init__(self) -> None:
        self.asked = 0
        super().__init__()

    def ask(self, work: Callable[[], None]) -> bool:
        self.asked += 1
        return super().ask(work)


class Late(Helper):
    """Comes when everything is done."""

    def __init__(self) -> None:
        self.works: list[Callable[[], None]] = []

    def ask(self, work: Callable[[], None]) -> bool:
        self.works.append(work)
        return True


def read(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rates = torch.tensor(RATES[: len(tokens)], dtype=torch.float64)
    return step_through(random_model(), tokens, rates)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", [Counting, Late])
def test_help_changes_no_bit(
    rows: int, kind: type[Counting] | type[Late], monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    tokens, helper = random_tokens(rows, 200), kind()
    monkeypatch.setattr(model.decoding, "own_helper", lambda: helper)
    helped = read(tokens)
    set_loop_threads(1)
    alone = read(tokens)
    assert torch.equal(helped[0], alone[0])
    assert torch.equal(helped[1], alone[1])
    assert 0 < int(alone[1][-1].sum()) <= 200
    if isinstance(helper, Late):
        for work in helper.works:
            work()  # finds nothing left, and ends
    assert (len(helper.works) if isinstance(helper, Late) else helper.asked) == 200


def test_without_a_step_to_help_with_the_helper_goes_when_it_is_over() -> None:
    desk, nothing = np.zeros(16 * 2, np.int64), np.empty((1, 1, 4), np.float32)
    thread = threading.Thread(target=help_rows, args=(desk, nothing, nothing, (np.ones((4, 4), np.float32),)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    desk[8] = 1
    thread.join(30)
    assert not thread.is_alive()


def test_more_rows_ask_nobody(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    helper = Counting()
    monkeypatch.setattr(model.decoding, "own_helper", lambda: helper)
    step_through(random_model(), random_tokens(3, 5), torch.ones(3, dtype=torch.float64))
    assert helper.asked == 0


def test_a_busy_helper_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    helper, release = Helper(), threading.Event()
    monkeypatch.setattr(model.decoding, "own_helper", lambda: helper)
    assert helper.ask(release.wait)  # type: ignore[arg-type]
    tokens = random_tokens(1, 20)
    busy = read(tokens)
    release.set()
    set_loop_threads(1)
    assert torch.equal(busy[0], read(tokens)[0])


def test_a_step_that_fails_lets_its_helper_go(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    helper, system = Helper(), random_model()
    monkeypatch.setattr(model.decoding, "own_helper", lambda: helper)
    monkeypatch.setattr(model.decoding, "decode_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        system.step(torch.tensor([65]), system.allocate_state(1), torch.ones(1, dtype=torch.float64))
    ended = threading.Event()
    for _ in range(3000):
        if helper.ask(ended.set):
            break
        threading.Event().wait(0.01)
    assert ended.wait(30)


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


def test_a_helper_reads_the_weights_of_a_resized_block(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    helper, results = Counting(), []
    monkeypatch.setattr(model.decoding, "own_helper", lambda: helper)
    for threads in (2, 1):
        set_loop_threads(threads)
        system = random_model()
        rates = torch.ones(1, dtype=torch.float64)
        step_through(system, random_tokens(1, 3), rates)
        for block in system.trunk:
            block.resize_state_space(8)
        state = system.allocate_state(1, d_state=None)
        state.trunk = tuple(block.mixer.zero_state(1, system.device) for block in system.trunk)
        state.columns.fill_(8)
        logits = [system.step(column, state, rates).logits for column in random_tokens(1, 40).unbind(1)]
        results.append(torch.stack(logits))
    assert helper.asked == 43
    assert torch.equal(*results)
