"""From the engine's thread to the event loop: seldom, in order, and never late."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.engine.engine import Output
from service.engine.engine_thread import Admission, EngineThread, Mailbox, join
from service.engine.sequence import FinishReason
from tests.service.engine.fakes import FakeRunner, make_engine, make_sequence

LONG = 3600.0


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def put(mailbox: Mailbox, got: list[str], text: str, *, urgent: bool = False) -> None:
    mailbox.put(lambda output: got.append(output.text), Output(make_sequence(), text), urgent=urgent)
    mailbox.flush()


def test_what_follows_waits_for_the_interval_and_what_is_urgent_takes_it_along() -> None:
    async def run() -> None:
        got: list[str] = []
        mailbox = Mailbox(asyncio.get_running_loop(), LONG)
        put(mailbox, got, "a", urgent=True)
        await turns()
        assert got == ["a"]
        put(mailbox, got, "b")
        put(mailbox, got, "c")
        await turns()
        assert got == ["a"]
        put(mailbox, got, "d", urgent=True)
        await turns()
        assert got == ["a", "b", "c", "d"]

    asyncio.run(run())


def test_what_waits_comes_by_itself() -> None:
    async def run() -> None:
        got: list[str] = []
        mailbox = Mailbox(asyncio.get_running_loop(), 0.01)
        for turn in range(3):  # again after it has been idle
            put(mailbox, got, "a")
            await turns()
            assert len(got) == 2 * turn + 1
            put(mailbox, got, "b")
            async with asyncio.timeout(20):
                while len(got) < 2 * turn + 2:
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)

    asyncio.run(run())


def test_without_an_interval_nothing_waits() -> None:
    async def run() -> None:
        got: list[str] = []
        mailbox = Mailbox(asyncio.get_running_loop(), 0.0)
        for text in "abc":
            put(mailbox, got, text)
            await turns()
            assert got[-1] == text

    asyncio.run(run())


def test_a_closed_loop_is_noticed_though_nothing_is_urgent() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop, LONG)
    put(mailbox, [], "a", urgent=True)
    put(mailbox, [], "b")
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        put(mailbox, [], "c")


@pytest.mark.parametrize("interval", [0.0, 0.01, LONG])
def test_choices_that_stream_side_by_side_lose_and_mix_nothing(interval: float) -> None:
    """A slow reader gets fewer outputs, the text is the same; the last one of each choice says that it is."""

    async def run() -> dict[int, list[Output]]:
        sequences = [make_sequence(max_tokens=length) for length in (1, 40, 17)]
        got: dict[int, list[Output]] = {index: [] for index in range(3)}
        outputs = thread.open(sequences)
        async with asyncio.timeout(20):
            async for output in outputs:
                got[sequences.index(output.sequence)].append(output)
                await asyncio.sleep(0.002)
        return got

    engine, _ = make_engine(FakeRunner(), time.monotonic, slots=3)
    thread = EngineThread(engine, Admission(3, 3), interval)
    thread.start()
    try:
        got = asyncio.run(run())
    finally:
        thread.stop()
    for outputs, length in zip(got.values(), (1, 40, 17), strict=True):
        assert len("".join(output.text for output in outputs)) == length
        assert [output.finish for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert outputs[-1].finish is FinishReason.LENGTH
    if interval == LONG:
        assert all(len(outputs) <= 2 + 3 for outputs in got.values())  # its first, its last, and with those of others


def test_joined_outputs_say_what_each_of_them_did() -> None:
    sequence = make_sequence()
    parts = [Output(sequence, "a"), Output(sequence, ""), Output(sequence, "b", FinishReason.STOP)]
    assert join(parts) == Output(sequence, "ab", FinishReason.STOP)
    assert join(parts[:1]) is parts[0]
