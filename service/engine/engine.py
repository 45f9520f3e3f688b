"""The engine: schedule, run, postprocess."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from model.cost import CostModel
from model.evaluation.tilings import PieceAnalysis
from service.engine.scheduler import Batch, Scheduler
from service.engine.sequence import FinishReason, Outcome, Phase, Sequence, TokenScore
from service.metrics import Metrics

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine asks of :class:`service.engine.model_runner.ModelRunner`."""

    @property
    def cost(self) -> CostModel:
        """What the model costs."""

    @property
    def state_bytes(self) -> int:
        """Bytes of all states held."""

    def prefill(self, sequence: Sequence) -> Outcome:
        """Read the next block of a prompt; after the last one, choose the first token if one is wanted."""

    def decode(self, sequences: list[Sequence]) -> list[Outcome]:
        """Generate one token for each."""

    def release(self, slot: int) -> None:
        """Drop the state in a slot."""

    def check_integrity(self, slots: set[int]) -> None:
        """Assert that states are held for these slots only, and are in order."""


@dataclass(frozen=True, slots=True)
class Output:
    """News of a sequence. Exactly one output of a sequence has ``finish`` set, and it is the last."""

    sequence: Sequence
    text: str = ""
    finish: FinishReason | None = None
    scores: list[TokenScore] = field(default_factory=list)
    analysis: PieceAnalysis | None = None

    @property
    def news(self) -> bool:
        """Whether it says anything."""
        return bool(self.text or self.finish or self.scores or self.analysis)


class Engine:
    """Runs sequences until they end. For one thread; knows nothing of HTTP or of queues between threads."""

    def __init__(self, runner: Runner, scheduler: Scheduler, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.runner = runner
        self.clock = clock
        self._scheduler = scheduler
        self._metrics = metrics

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not (self._scheduler.running or self._scheduler.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._scheduler.add(sequence)
        self._metrics.decisions.labels(sequence.grant.reason.value).inc()
        self._update_gauges()

    def step(self) -> list[Output]:
        """Run one step; what became of the sequences in it."""
        began = self.clock()
        batch = self._scheduler.schedule()
        self._update_gauges()
        for sequence in (batch.prefill, *batch.decode):
            if sequence is not None and sequence.scheduled is None:
                sequence.scheduled = began
        scheduled = self.clock()
        ran, outputs = self._run(batch)
        run_end = self.clock()
        outputs += [self._postprocess(sequence, outcome, run_end) for sequence, outcome in ran]
        self._update_gauges()
        parts = {"schedule": scheduled - began, "run": run_end - scheduled, "postprocess": self.clock() - run_end}
        for part, seconds in parts.items():
            self._metrics.step.labels(part).observe(seconds)
        return outputs

    def end(self, sequence: Sequence, reason: FinishReason) -> Output | None:
        """End a sequence from outside, whatever it is doing; None if it has ended already."""
        if sequence.finish is not None:
            return None
        sequence.finish = reason
        self._close(sequence, self.clock())
        self._update_gauges()
        return Output(sequence, sequence.text.flush(), reason)

    def end_all(self, reason: FinishReason) -> list[Output]:
        """End every sequence."""
        everyone = [*self._scheduler.running, *self._scheduler.waiting]
        return [output for sequence in everyone if (output := self.end(sequence, reason)) is not None]

    def check_integrity(self) -> None:
        """Assert that slots and sequences match."""
        self._scheduler.check_integrity()
        self.runner.check_integrity(
            {sequence.slot for sequence in self._scheduler.running if sequence.slot is not None}
        )

    def _run(self, batch: Batch) -> tuple[list[tuple[Sequence, Outcome]], list[Output]]:
        """Run the model; what it returned, and the ends of those for which it failed."""
        ran: list[tuple[Sequence, Outcome]] = []
        failed: list[Sequence] = []
        if batch.decode:
            try:
                ran += zip(batch.decode, self.runner.decode(batch.decode), strict=True)
            except Exception:
                logger.exception("a decoding step failed; its %d sequences end", len(batch.decode))
                failed += batch.decode
            else:
                self._metrics.batch_size.observe(len(batch.decode))
                self._metrics.trunk_batch_size.observe(sum(len(outcome.tile_ends) for _, outcome in ran))
        if batch.prefill is not None:
            try:
                ran.append((batch.prefill, self.runner.prefill(batch.prefill)))
            except Exception:
                logger.exception("a prefill step failed; its sequence ends")
                failed.append(batch.prefill)
        ends = [self.end(sequence, FinishReason.ERROR) for sequence in failed]
        return ran, [output for output in ends if output is not None]

    def _postprocess(self, sequence: Sequence, outcome: Outcome, now: float) -> Output:
        """Book what a step did for one sequence, and end the sequence if it is done."""
        sequence.account(outcome.flops, outcome.full_flops)
        self._metrics.spent(outcome.flops, outcome.full_flops, sequence.phase.value)
        for size in sequence.close_tiles(outcome.tile_ends):
            self._metrics.tile_size.observe(size)
        sequence.positions += outcome.positions
        if sequence.phase is Phase.PREFILL:
            sequence.read += outcome.positions
            self._metrics.prompt_tokens.inc(outcome.positions)
        text = sequence.finish_reading() if outcome.token is None else self._accept(sequence, outcome.token, now)
        if sequence.finish is not None:
            self._close(sequence, now)
        return Output(sequence, text, sequence.finish, outcome.scores, outcome.analysis)

    def _accept(self, sequence: Sequence, token: int, now: float) -> str:
        """Add a token to a sequence; the text that may be sent now."""
        sequence.phase = Phase.DECODE
        text = sequence.accept(token)
        self._metrics.generation_tokens.inc()
        if sequence.latest_token is None:
            sequence.first_token = now
            self._metrics.first_token.observe(now - sequence.arrived)
        else:
            self._metrics.inter_token.observe(now - sequence.latest_token)
        sequence.latest_token = now
        return text

    def _close(self, sequence: Sequence, now: float) -> None:
        """Give back what a sequence held, and record its end."""
        slot = self._scheduler.remove(sequence)
        if slot is not None:
            self.runner.release(slot)
        metrics, usage = self._metrics, sequence.usage(self.runner.cost)
        assert sequence.finish is not None, "only what has ended is closed"
        metrics.finished.labels(sequence.finish.value).inc()
        metrics.request.observe(now - sequence.arrived)
        for kind, value in (("requested", usage.requested), ("granted", usage.granted), ("spent", usage.spent)):
            if kind != "spent" or usage.full_flops:
                metrics.ratio.labels(kind).observe(value)
        if sequence.scheduled is not None:
            metrics.queue.observe(sequence.scheduled - sequence.arrived)
            if sequence.first_token is not None:
                metrics.prefill.observe(sequence.first_token - sequence.scheduled)
                metrics.decode.observe(now - sequence.first_token)

    def _update_gauges(self) -> None:
        self._metrics.running.set(len(self._scheduler.running))
        self._metrics.waiting.set(len(self._scheduler.waiting))
        self._metrics.state_bytes.labels("used").set(self.runner.state_bytes)
