"""The thread that owns the engine, and the way to it from the event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

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
        engine: nothing else may touch it once the thread runs. max_open: requests that may run and wait together.
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
        self._accepting = False
        self._inbox.put(self._request_stop)
        self._thread.join()

    def stalled_for(self) -> float:
        """Seconds that the step in progress has taken; infinite once the thread has ended, 0 while it waits."""
        began = self._step_began
        if not self._thread.is_alive():
            return float("inf")
        return 0.0 if began is None else self._engine.clock() - began

    def submit(self, sequence: Sequence, deliver: Deliver) -> None:
        """Queue a sequence. ``deliver`` is called in the engine's thread, and last with an output that has ``finish``.

        Raises:
            EngineBusyError: too many requests are open. EngineStoppedError: no new ones are taken.
        """
        with self._lock:
            if not (self._accepting and self._thread.is_alive()):
                raise EngineStoppedError
            if len(self._open) >= self._max_open:
                raise EngineBusyError
            self._open[sequence] = deliver
        self._inbox.put(lambda: self._engine.add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence before the next step; nothing happens if it has ended."""
        if sequence in self._open:
            self._inbox.put(lambda: self._publish([self._engine.end(sequence, FinishReason.ABORT)]))

    async def stream(self, sequence: Sequence) -> AsyncIterator[Output]:
        """Submit a sequence and yield its outputs; leaving early cancels it.

        Raises:
            EngineBusyError, EngineStoppedError: as :meth:`submit`.
        """
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Output] = asyncio.Queue()  # bounded by max_tokens
        self.submit(sequence, lambda output: loop.call_soon_threadsafe(outputs.put_nowait, output))
        try:
            while True:
                output = await outputs.get()
                yield output
                if output.finish is not None:
                    return
        finally:
            self.cancel(sequence)

    async def complete(self, sequence: Sequence) -> str:
        """Submit a sequence and wait for all of its text; being cancelled cancels it. Raises as :meth:`stream`."""
        async with aclosing(self.stream(sequence)) as outputs:  # type: ignore[type-var]
            return "".join([output.text async for output in outputs])

    def check_integrity(self) -> None:
        """Assert that the engine is in order; call only while it is idle."""
        self._engine.check_integrity()
        assert not self._open or not self._engine.idle, "an open request has a sequence in the engine"

    def _main(self) -> None:
        while not self._stop:
            self._receive(block=self._engine.idle)
            if self._stop or self._engine.idle:
                continue
            self._step_began = self._engine.clock()
            try:
                outputs: list[Output] = self._engine.step()
            except Exception:
                logger.exception("an engine step failed outside the model; every open request ends")
                outputs = self._engine.end_all(FinishReason.ERROR)
            self._step_began = None
            self._publish(outputs)
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

    def _publish(self, outputs: list[Output] | list[Output | None]) -> None:
        """Deliver outputs that say something."""
        for output in outputs:
            if output is None or not (output.text or output.finish):
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
