"""The thread that owns the engine, and the way to it from the event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Self

from service.engine.engine import Engine, Output
from service.engine.sequence import FinishReason, Sequence

logger = logging.getLogger(__name__)

Deliver = Callable[[Output], object]


class EngineBusyError(Exception):
    """As many requests are open as the server takes."""


class EngineStoppedError(Exception):
    """The server is stopping, or its engine has died."""


class EngineThread:
    """Runs an engine in a thread of its own. Every method may be called from any thread.

    Args:
        engine: nothing else may touch it once the thread runs. max_open: sequences that may run and wait together.
    """

    def __init__(self, engine: Engine, max_open: int) -> None:
        self._engine = engine
        self._max_open = max_open
        self._lock = threading.Lock()
        self._open: dict[Sequence, Deliver] = {}
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._accepting = False
        self._stop = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._accepting = True
        self._thread.start()

    def stop(self) -> None:
        """Refuse new requests, end the open ones, and wait for the thread."""
        with self._lock:  # whatever was accepted before stands in the inbox before the stop
            self._accepting = False
            self._inbox.put(self._request_stop)
        self._thread.join()

    @property
    def accepting(self) -> bool:
        """New sequences are taken, if there is room."""
        return self._accepting and self._thread.is_alive()

    def stalled_for(self) -> float:
        """Seconds that the step in progress has taken; infinite once the thread has ended, 0 while it waits."""
        began = self._step_began
        if not self._thread.is_alive():
            return float("inf")
        return 0.0 if began is None else self._engine.clock() - began

    def submit(self, sequences: Collection[Sequence], deliver: Deliver) -> None:
        """Queue sequences, all or none.

        ``deliver`` is called in the engine's thread, for each sequence last with an output that has ``finish``.

        Raises:
            EngineBusyError: too many sequences are open. EngineStoppedError: no new ones are taken.
        """
        with self._lock:
            if not self.accepting:
                raise EngineStoppedError
            if len(self._open) + len(sequences) > self._max_open:
                raise EngineBusyError
            for sequence in sequences:
                self._open[sequence] = deliver
                self._inbox.put(partial(self._engine.add, sequence))

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence before the next step; nothing happens if it has ended."""
        if sequence in self._open:
            self._inbox.put(lambda: self._publish([self._engine.end(sequence, FinishReason.ABORT)]))

    def open(self, sequences: Collection[Sequence]) -> OutputStream:
        """Submit sequences from an event loop; their outputs. Raises as :meth:`submit`."""
        return OutputStream(self, sequences)

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
        for output in outputs:
            if output is None or not output.news:
                continue
            with self._lock:
                ended = output.finish is not None
                deliver = self._open.pop(output.sequence, None) if ended else self._open.get(output.sequence)
            if deliver is None:
                continue
            try:
                deliver(output)
            except RuntimeError:  # the receiving event loop is closed
                logger.warning("a receiver has gone; its request ends")
                self._engine.end(output.sequence, FinishReason.ABORT)
                with self._lock:
                    self._open.pop(output.sequence, None)


class OutputStream:
    """Iterates over the outputs of sequences in the event loop that made it; :meth:`close` it in any case."""

    def __init__(self, engine: EngineThread, sequences: Collection[Sequence]) -> None:
        self.sequences = sequences
        self._engine = engine
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()  # bounded by max_tokens
        loop = asyncio.get_running_loop()
        self.on_end: Callable[[], None] | None = None
        """Called in the event loop when every sequence has ended, whether or not anybody reads the outputs."""
        engine.submit(sequences, lambda output: loop.call_soon_threadsafe(self._receive, output))
        self._unread = self._unfinished = len(sequences)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        if not self._unread:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._unread -= output.finish is not None
        return output

    def _receive(self, output: Output) -> None:
        self._outputs.put_nowait(output)
        self._unfinished -= output.finish is not None
        if not self._unfinished and self.on_end is not None:
            self.on_end()

    def close(self) -> None:
        """Cancel the sequences that have not ended."""
        for sequence in self.sequences:
            self._engine.cancel(sequence)
