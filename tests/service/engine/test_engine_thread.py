from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from service.engine.engine import Engine, Output
from service.engine.engine_thread import EngineBusyError, EngineStoppedError, EngineThread
from service.engine.scheduler import Scheduler
from service.engine.sequence import FinishReason, Sequence
from service.metrics import Metrics
from tests.service.engine.fakes import FakeRunner, make_sequence


class GatedRunner(FakeRunner):
    """Waits before every prefill until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def prefill(self, sequence: Sequence) -> object:
        assert self.gate.wait(20)
        return super().prefill(sequence)


class Receiver:
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
    thread = EngineThread(Engine(runner, Scheduler(1), Metrics("fake"), time.monotonic), max_open=2)
    thread.start()
    yield thread
    runner.gate.set()
    thread.stop()
    thread.check_integrity()


def test_outputs_arrive_in_order_and_end_once(thread: EngineThread, runner: GatedRunner) -> None:
    runner.gate.set()
    receiver = Receiver()
    thread.submit([make_sequence(max_tokens=4)], receiver)
    assert receiver.reason() is FinishReason.LENGTH
    assert "".join(output.text for output in receiver.outputs) == "aaaa"


def test_more_open_requests_than_allowed_are_refused_until_one_ends(thread: EngineThread, runner: GatedRunner) -> None:
    receivers = [Receiver(), Receiver()]
    for receiver in receivers:
        thread.submit([make_sequence()], receiver)
    with pytest.raises(EngineBusyError):
        thread.submit([make_sequence()], Receiver())
    runner.gate.set()
    assert [receiver.reason() for receiver in receivers] == [FinishReason.LENGTH] * 2
    late = Receiver()
    thread.submit([make_sequence()], late)
    assert late.reason() is FinishReason.LENGTH


def test_cancelling_ends_running_and_waiting_sequences(thread: EngineThread, runner: GatedRunner) -> None:
    sequences, receivers = [make_sequence(prompt=9), make_sequence()], [Receiver(), Receiver()]
    for sequence, receiver in zip(sequences, receivers, strict=True):
        thread.submit([sequence], receiver)
    for sequence in sequences:
        thread.cancel(sequence)
    runner.gate.set()
    assert [receiver.reason() for receiver in receivers] == [FinishReason.ABORT] * 2
    assert sum(line.startswith("prefill") for line in runner.log) <= 1, "at most the step in progress is finished"


def test_stopping_ends_what_is_open_and_refuses_what_comes(runner: GatedRunner) -> None:
    thread = EngineThread(Engine(runner, Scheduler(1), Metrics("fake"), time.monotonic), max_open=2)
    thread.start()
    receiver = Receiver()
    thread.submit([make_sequence(prompt=100)], receiver)
    threading.Timer(0.1, runner.gate.set).start()
    thread.stop()
    assert receiver.reason() is FinishReason.ABORT
    with pytest.raises(EngineStoppedError):
        thread.submit([make_sequence()], Receiver())
    assert thread.stalled_for() == float("inf")


def test_a_receiver_that_has_gone_ends_its_request_only(thread: EngineThread, runner: GatedRunner) -> None:
    def gone(_: Output) -> None:
        raise RuntimeError("Event loop is closed")

    thread.submit([make_sequence(max_tokens=50)], gone)
    stays = Receiver()
    thread.submit([make_sequence()], stays)
    runner.gate.set()
    assert stays.reason() is FinishReason.LENGTH


def test_a_step_in_progress_shows_as_stalled(thread: EngineThread, runner: GatedRunner) -> None:
    assert thread.stalled_for() == 0.0
    receiver = Receiver()
    thread.submit([make_sequence()], receiver)
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
    receiver = Receiver()
    thread.submit([make_sequence()], receiver)
    assert receiver.reason() is FinishReason.ERROR
    monkeypatch.undo()
    again = Receiver()
    thread.submit([make_sequence()], again)
    assert again.reason() is FinishReason.LENGTH
