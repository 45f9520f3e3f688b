from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from service.engine.engine import Output
from service.engine.engine_thread import Admission, EngineBusyError, EngineStoppedError, EngineThread, Receiver
from service.engine.scheduler import Scheduler
from service.engine.sequence import FinishReason, Outcome, Sequence
from tests.service.engine.fakes import COST, FakeRunner, make_engine, make_sequence


class GatedRunner(FakeRunner):
    """Waits before every prefill until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def prefill(self, sequences: list[Sequence]) -> list[Outcome | None]:
        assert self.gate.wait(20)
        return super().prefill(sequences)


def make_thread(runner: FakeRunner, **admission: float) -> EngineThread:
    engine, _ = make_engine(runner, time.monotonic, slots=1)
    return EngineThread(engine, Admission(2, 1, **admission))


def no_flush() -> None:
    pass


class Collector:
    """Collects outputs, and lets a test wait for the last."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.ended = threading.Event()

    def __call__(self, output: Output) -> None:
        assert not self.ended.is_set(), "nothing comes after the end"
        self.outputs.append(output)
        if output.finish is not None:
            self.ended.set()

    def reason(self) -> FinishReason | None:
        assert self.ended.wait(20)
        return self.outputs[-1].finish


@pytest.fixture
def runner() -> GatedRunner:
    return GatedRunner()


@pytest.fixture
def thread(runner: GatedRunner) -> Iterator[EngineThread]:
    thread = make_thread(runner)
    thread.start()
    yield thread
    runner.gate.set()
    thread.stop()
    thread.check_integrity()


def test_outputs_arrive_in_order_and_end_once(thread: EngineThread, runner: GatedRunner) -> None:
    runner.gate.set()
    receiver = Collector()
    thread.submit([make_sequence(max_tokens=4)], Receiver(receiver, no_flush))
    assert receiver.reason() is FinishReason.LENGTH
    assert "".join(output.text for output in receiver.outputs) == "aaaa"


def test_whoever_reads_at_the_end_only_is_woken_once(thread: EngineThread, runner: GatedRunner) -> None:
    receiver, woken = Collector(), threading.Event()
    counts: list[int] = []

    def flush() -> None:
        counts.append(len(receiver.outputs))
        woken.set()

    thread.submit([make_sequence(max_tokens=4)], Receiver(receiver, flush, whole=True))
    runner.gate.set()
    assert woken.wait(10)
    assert receiver.reason() is FinishReason.LENGTH
    assert "".join(output.text for output in receiver.outputs) == "aaaa"
    assert counts == [len(receiver.outputs)]
    assert len(receiver.outputs) > 1


def test_more_open_requests_than_allowed_are_refused_until_one_ends(thread: EngineThread, runner: GatedRunner) -> None:
    receivers = [Collector(), Collector()]
    for receiver in receivers:
        thread.submit([make_sequence()], Receiver(receiver, no_flush))
    with pytest.raises(EngineBusyError):
        thread.submit([make_sequence()], Receiver(Collector(), no_flush))
    runner.gate.set()
    assert [receiver.reason() for receiver in receivers] == [FinishReason.LENGTH] * 2
    late = Collector()
    thread.submit([make_sequence()], Receiver(late, no_flush))
    assert late.reason() is FinishReason.LENGTH


def test_cancelling_ends_running_and_waiting_sequences(thread: EngineThread, runner: GatedRunner) -> None:
    sequences, receivers = [make_sequence(prompt=9), make_sequence()], [Collector(), Collector()]
    for sequence, receiver in zip(sequences, receivers, strict=True):
        thread.submit([sequence], Receiver(receiver, no_flush))
    for sequence in sequences:
        thread.cancel(sequence)
    runner.gate.set()
    assert [receiver.reason() for receiver in receivers] == [FinishReason.ABORT] * 2
    assert sum(line.startswith("prefill") for line in runner.log) <= 1, "at most the step in progress is finished"


def test_stopping_ends_what_is_open_and_refuses_what_comes(runner: GatedRunner) -> None:
    thread = make_thread(runner)
    thread.start()
    receiver = Collector()
    thread.submit([make_sequence(prompt=100)], Receiver(receiver, no_flush))
    threading.Timer(0.1, runner.gate.set).start()
    thread.stop()
    assert receiver.reason() is FinishReason.ABORT
    with pytest.raises(EngineStoppedError):
        thread.submit([make_sequence()], Receiver(Collector(), no_flush))
    assert thread.stalled_for() == float("inf")


def test_a_receiver_that_has_gone_ends_its_request_only(thread: EngineThread, runner: GatedRunner) -> None:
    def gone() -> None:
        raise RuntimeError("Event loop is closed")

    thread.submit([make_sequence(max_tokens=50)], Receiver(lambda _: None, gone))
    stays = Collector()
    thread.submit([make_sequence()], Receiver(stays, no_flush))
    runner.gate.set()
    assert stays.reason() is FinishReason.LENGTH


def test_a_step_in_progress_shows_as_stalled(thread: EngineThread, runner: GatedRunner) -> None:
    assert thread.stalled_for() == 0.0
    receiver = Collector()
    thread.submit([make_sequence()], Receiver(receiver, no_flush))
    while thread.stalled_for() == 0.0:
        time.sleep(0.001)
    runner.gate.set()
    receiver.reason()
    while thread.stalled_for() != 0.0:
        time.sleep(0.001)
    assert thread.stalled_for() == 0.0


def test_a_fault_outside_the_model_ends_open_requests_and_the_thread_lives(
    thread: EngineThread, runner: GatedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("planted")

    runner.gate.set()
    monkeypatch.setattr(Scheduler, "schedule", fail)
    receiver = Collector()
    thread.submit([make_sequence()], Receiver(receiver, no_flush))
    assert receiver.reason() is FinishReason.ERROR
    monkeypatch.undo()
    again = Collector()
    thread.submit([make_sequence()], Receiver(again, no_flush))
    assert again.reason() is FinishReason.LENGTH


def test_a_step_that_does_not_end_fails_its_requests_and_the_engine_recovers(runner: GatedRunner) -> None:
    thread = make_thread(runner, stall_seconds=1.0)
    thread.start()
    stuck, waits = Collector(), Collector()
    thread.submit([make_sequence()], Receiver(stuck, no_flush))
    thread.submit([make_sequence()], Receiver(waits, no_flush))
    assert [stuck.reason(), waits.reason()] == [FinishReason.ERROR] * 2
    assert not thread.accepting
    with pytest.raises(EngineStoppedError):
        thread.submit([make_sequence()], Receiver(Collector(), no_flush))
    runner.gate.set()
    while not thread.accepting:
        time.sleep(0.001)
    again = Collector()
    thread.submit([make_sequence()], Receiver(again, no_flush))
    assert again.reason() is FinishReason.LENGTH
    thread.stop()
    thread.check_integrity()


def test_a_request_that_would_wait_too_long_is_refused_with_an_estimate(runner: GatedRunner) -> None:
    engine, _ = make_engine(runner, time.monotonic, slots=1)  # one of the two that might run at once waits all the same
    engine.pace.worked(flops=COST.full_flops(1, 0), seconds=2.0)  # two seconds a token
    thread = EngineThread(engine, Admission(100, 2, longest_queue=15.0))
    thread.start()
    runs, waits = Collector(), Collector()
    thread.submit([running := make_sequence(max_tokens=0)], Receiver(runs, no_flush))
    while running.scheduled is None:
        time.sleep(0.001)
    thread.submit([make_sequence(prompt=10, max_tokens=0)], Receiver(waits, no_flush))
    with pytest.raises(EngineBusyError) as refused:
        thread.submit([make_sequence(prompt=1, max_tokens=0)], Receiver(Collector(), no_flush))
    assert refused.value.retry_seconds == pytest.approx(20.0)
    runner.gate.set()
    assert [runs.reason(), waits.reason()] == [FinishReason.LENGTH] * 2
    thread.stop()


def test_draining_refuses_what_comes_and_finishes_what_is_open(runner: GatedRunner) -> None:
    thread = make_thread(runner)
    thread.start()
    open_one = Collector()
    thread.submit([make_sequence()], Receiver(open_one, no_flush))
    thread.drain()
    with pytest.raises(EngineStoppedError):
        thread.submit([make_sequence()], Receiver(Collector(), no_flush))
    runner.gate.set()
    assert open_one.reason() is FinishReason.LENGTH
    thread.stop()
