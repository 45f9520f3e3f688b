"""The thread that owns the engine, and the way to it from the event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Self

from service.engine.engine import Engine, Output
from service.engine.sequence import FinishReason, Sequence

logger = logging.getLogger(__name__)

Deliver = Callable[[Output], object]
Flush = Callable[[], object]


class EngineBusyError(Exception):
    """As much waits as the server takes.

    Args:
        retry_seconds: until there may be room.
    """

    def __init__(self, retry_seconds: float) -> None:
        super().__init__(f"the queue is full for about {retry_seconds:.0f} s")
        self.retry_seconds = retry_seconds


class EngineStoppedError(Exception):
    """The server is stopping, or its engine is stuck or has died."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What is let in."""

    most_open: int
    """Sequences that may run and wait together."""
    most_running: int
    """Of them, how many run at once."""
    longest_queue: float = math.inf
    """Seconds that a new sequence may have to wait, as far as can be foreseen."""
    stall_seconds: float = math.inf
    """A step longer than this has failed."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where the outputs of a sequence go."""

    deliver: Deliver
    """Called for each, the last one with ``finish``."""
    flush: Flush
    """Called after the outputs of a step."""
    whole: bool = False
    """Nobody reads before the sequence has ended, so that ``flush`` is not called before."""


class EngineThread:
    """Runs an engine in a thread of its own, and watches over it. Every method may be called from any thread.

    Args:
        engine: nothing else may touch it once the thread runs. admission: what is let in.
        stream_interval: seconds between two times that an event loop is given outputs; see :class:`Mailbox`.
    """

    def __init__(self, engine: Engine, admission: Admission, stream_interval: float = 0.0) -> None:
        self._engine = engine
        self._admission = admission
        self._stream_interval = stream_interval
        self._lock = threading.Lock()
        self._open: dict[Sequence, Receiver] = {}
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._accepting = False
        self._stop = False
        self._step_began: float | None = None
        self._mailbox: Mailbox | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._accepting = True
        self._thread.start()
        if math.isfinite(self._admission.stall_seconds):
            self._watchdog.start()

    def drain(self) -> None:
        """Refuse new requests; the open ones go on."""
        with self._lock:  # whatever was accepted before stands in the inbox before anything that follows
            self._accepting = False

    def abort_all(self) -> None:
        """End every open request before the next step."""
        self._inbox.put(lambda: self._publish(self._engine.end_all(FinishReason.ABORT)))

    def stop(self) -> None:
        """Refuse new requests, end the open ones, and wait for the thread."""
        self.drain()
        self._inbox.put(self._request_stop)
        self._thread.join()
        self._ended.set()

    @property
    def accepting(self) -> bool:
        """New sequences are taken, if there is room."""
        return self._accepting and self.stalled_for() <= self._admission.stall_seconds

    def stalled_for(self) -> float:
        """Seconds that the step in progress has taken; infinite once the thread has ended, 0 while it waits."""
        began = self._step_began
        if not self._thread.is_alive():
            return math.inf
        return 0.0 if began is None else self._engine.clock() - began

    def submit(self, sequences: Collection[Sequence], receiver: Receiver) -> None:
        """Queue sequences, all or none; all choices of one prompt together.

        The receiver is called in the engine's thread, for each sequence last with an output that has ``finish``.

        Raises:
            EngineBusyError: too much waits. EngineStoppedError: no new sequences are taken.
        """
        for sequence in sequences:
            sequence.reserved = self._engine.reserve(sequence)
        with self._lock:
            if not self.accepting:
                raise EngineStoppedError
            most, count = self._admission, len(self._open) + len(sequences)
            wait = self._queue_seconds() if count > most.most_running else 0.0
            if count > most.most_open or wait > most.longest_queue:
                self._engine.load.refused(self._engine.clock())
                raise EngineBusyError(wait)
            for sequence in sequences:
                self._open[sequence] = receiver
            self._inbox.put(partial(self._engine.add, tuple(sequences)))

    def _queue_seconds(self) -> float:
        """How long the work of those that wait is going to take."""
        return self._engine.pace.seconds_for(sum(s.reserved for s in self._open if s.scheduled is None))

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence before the next step; nothing happens if it has ended."""
        if sequence in self._open:
            self._inbox.put(lambda: self._publish([self._engine.end(sequence, FinishReason.ABORT)]))

    def open(self, sequences: Collection[Sequence], *, whole: bool = False) -> OutputStream:
        """Submit sequences from an event loop; their outputs. Raises as :meth:`submit`.

        ``whole``: those of a sequence may come together when it has ended: waking the loop takes longer than a step.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._mailbox is None or self._mailbox.loop is not loop:
                self._mailbox = Mailbox(loop, self._stream_interval)
            mailbox = self._mailbox
        return OutputStream(self, mailbox, sequences, whole=whole)

    def check_integrity(self) -> None:
        """Assert that nothing is left of requests that ended; for a moment at which none is open."""
        self._engine.check_integrity()
        assert self._engine.idle
        assert not self._open

    def _main(self) -> None:
        while not self._stop:
            try:
                self._receive(block=self._engine.idle)
                if not (self._stop or self._engine.idle):
                    self._step_began = self._engine.clock()
                    self._publish(self._engine.step())
            except Exception:
                logger.exception("the engine failed outside the model; every open request ends")
                self._publish(self._engine.end_all(FinishReason.ERROR))
            self._step_began = None
        self._publish(self._engine.end_all(FinishReason.ABORT))
        self._engine.runner.close()

    def _receive(self, *, block: bool) -> None:
        """Carry out everything in the inbox; wait for the first if there is nothing else to do."""
        while True:
            try:
                command = self._inbox.get(block=block)
            except queue.Empty:
                return
            command()
            block = False

    def _request_stop(self) -> None:
        self._stop = True

    def _publish(self, outputs: Iterable[Output | None]) -> None:
        """Deliver outputs that say something."""
        touched: dict[Flush, None] = {}
        for output in outputs:
            if output is None or not output.news:
                continue
            with self._lock:
                ended = output.finish is not None
                receiver = self._open.pop(output.sequence, None) if ended else self._open.get(output.sequence)
            if receiver is not None:
                receiver.deliver(output)
                if ended or not receiver.whole:
                    touched[receiver.flush] = None
        for flush in touched:
            try:
                flush()
            except RuntimeError:  # the receiving event loop is closed
                logger.warning("a receiver has gone; its requests end")
                self._forget(flush)

    def _forget(self, flush: Flush) -> None:
        """End the sequences of a receiver that nobody reads any more."""
        with self._lock:
            gone = [sequence for sequence, receiver in self._open.items() if receiver.flush == flush]
            for sequence in gone:
                del self._open[sequence]
        for sequence in gone:
            self._engine.end(sequence, FinishReason.ABORT)

    def _watch(self) -> None:
        """Fail the open requests of a step that does not end, so that their clients need not wait for it."""
        limit = self._admission.stall_seconds
        while not self._ended.wait(min(1.0, limit / 4.0)):
            if self._thread.is_alive() and self._open and self.stalled_for() > limit:
                self._fail_open()

    def _fail_open(self) -> None:
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = "".join(traceback.format_stack(frame))
        logger.error("a step of the engine does not end; every open request fails. It is here:\n%s", stack)
        with self._lock:
            failed = list(self._open)
        for sequence in failed:  # the engine itself learns of it when, and if, the step ends
            self._inbox.put(partial(self._engine.end, sequence, FinishReason.ERROR))
        self._publish(Output(sequence, finish=FinishReason.ERROR) for sequence in failed)


class Mailbox:
    """Takes outputs from the engine's thread to one event loop, which is woken once per step at most.

    Waking it takes about as long as a step of a small model. So what comes within ``interval`` seconds of the last time
    waits for the next one, unless it is urgent: what begins or ends a sequence is.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self.loop = loop
        self._interval = interval
        self._lock = threading.Lock()
        self._outputs: list[tuple[Deliver, Output]] = []
        self._urgent = False
        self._waking = False
        """The loop looks for outputs by itself, now or when the interval is over."""
        self._timer: asyncio.TimerHandle | None = None
        """Of the loop alone."""

    def put(self, deliver: Deliver, output: Output, *, urgent: bool) -> None:
        """Have ``deliver`` called in the event loop."""
        with self._lock:
            self._outputs.append((deliver, output))
            self._urgent = self._urgent or urgent

    def flush(self) -> None:
        """Hand over what was put, now or within the interval.

        Raises:
            RuntimeError: the event loop is closed.
        """
        with self._lock:
            wake = self._urgent or not self._waking
            self._urgent, self._waking = False, True
        if wake:
            self.loop.call_soon_threadsafe(self._hand_out)
        elif self.loop.is_closed():
            raise RuntimeError("the event loop is closed")

    def _hand_out(self) -> None:
        with self._lock:
            outputs, self._outputs = self._outputs, []
            self._waking = bool(outputs) and self._interval > 0.0
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self._interval, self._hand_out) if self._waking else None
        for deliver, output in outputs:
            deliver(output)


class OutputStream:
    """Iterates over the outputs of sequences in the event loop that made it; :meth:`close` it in any case.

    Outputs of a sequence that nobody has read yet become one.
    """

    def __init__(self, engine: EngineThread, mailbox: Mailbox, sequences: Collection[Sequence], *, whole: bool) -> None:
        self.sequences = sequences
        self._engine = engine
        self._mailbox = mailbox
        self._ready: dict[Sequence, list[Output]] = {}  # bounded by max_tokens
        self._news = asyncio.Event()
        self._quiet = set(sequences) if whole else set[Sequence]()
        """Sequences whose outputs can wait until they end; of the engine's thread."""
        self.on_end: Callable[[], None] | None = None
        """Called in the event loop when every sequence has ended, whether or not anybody reads the outputs."""
        self._unread = self._unfinished = len(sequences)
        engine.submit(sequences, Receiver(self._put, mailbox.flush, whole))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        if not self._unread:
            raise StopAsyncIteration
        await self._news.wait()
        sequence = next(iter(self._ready))
        output = join(self._ready.pop(sequence))
        if not self._ready:
            self._news.clear()
        self._unread -= output.finish is not None
        return output

    def _put(self, output: Output) -> None:
        urgent = output.finish is not None or output.sequence not in self._quiet
        self._quiet.add(output.sequence)
        self._mailbox.put(self._receive, output, urgent=urgent)

    def _receive(self, output: Output) -> None:
        self._ready.setdefault(output.sequence, []).append(output)
        self._news.set()
        self._unfinished -= output.finish is not None
        if not self._unfinished and self.on_end is not None:
            self.on_end()

    def close(self) -> None:
        """Cancel the sequences that have not ended."""
        for sequence in self.sequences:
            self._engine.cancel(sequence)


def join(outputs: list[Output]) -> Output:
    """One output that says what several of the same sequence do, at least one of them."""
    first, last = outputs[0], outputs[-1]
    if first is last:
        return first
    return Output(
        first.sequence,
        text="".join(output.text for output in outputs),
        finish=last.finish,
        scores=[score for output in outputs for score in output.scores],
        analyses=[piece for output in outputs for piece in output.analyses],
    )
