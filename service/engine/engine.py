"""The engine: schedule, run, postprocess."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from model.cost import CostModel
from model.evaluation.tilings import PieceAnalysis
from service.engine.load import LoadControl, Pace
from service.engine.scheduler import Batch, Scheduler
from service.engine.sequence import FinishReason, Outcome, Phase, Sequence, SharedPrompt, TokenScore
from service.metrics import Metrics

logger = logging.getLogger(__name__)

_BOOKING_SECONDS = 0.02
"""How far the counters may be behind while nothing begins or ends: to count takes as long as to choose a token."""

Ran = list[tuple[Sequence, Outcome | None]]
"""What the model returned for each sequence; None where it failed."""


class Runner(Protocol):
    """What the engine asks of :class:`service.engine.model_runner.ModelRunner`."""

    @property
    def cost(self) -> CostModel:
        """What the model costs."""

    @property
    def state_bytes(self) -> Mapping[str, int]:
        """Bytes of states by kind."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes allocated for the states of generating sequences."""

    def resume(self, sequence: Sequence) -> None:
        """Before a prompt is read: start behind as much of it as is known already."""

    def prefill(self, sequences: list[Sequence]) -> list[Outcome | None]:
        """Read the next block of each prompt; after the last one, choose the first token if one is wanted.

        None for one that failed.
        """

    def fork(self, sequence: Sequence) -> Outcome:
        """Start at the end of a prompt that another choice has read, and choose the first token if one is wanted."""

    def decode(self, sequences: list[Sequence]) -> list[Outcome | None]:
        """Generate one token for each; None for one whose logits are no numbers."""

    def resize(self, sequence: Sequence) -> None:
        """Go on with ``sequence.columns`` of the trunk's state."""

    def release(self, slot: int) -> None:
        """Drop the state in a slot."""

    def drop_end(self, prompt: SharedPrompt) -> None:
        """Drop what was kept of the end of a prompt; nothing happens if nothing was."""

    def close(self) -> None:
        """Let go of what it runs on."""

    def check_integrity(self, slots: set[int]) -> None:
        """Assert that states are held for these slots only, and are in order."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a request may take, in seconds from its arrival."""

    queue: float = math.inf
    """Until it starts."""
    request: float = math.inf
    """Until it ends."""


@dataclass(frozen=True, slots=True)
class Output:
    """News of a sequence. Exactly one output of a sequence has ``finish`` set, and it is the last."""

    sequence: Sequence
    text: str = ""
    finish: FinishReason | None = None
    scores: list[TokenScore] = field(default_factory=list)
    analyses: list[PieceAnalysis] = field(default_factory=list)

    @property
    def news(self) -> bool:
        """Whether it says anything."""
        return bool(self.text or self.finish or self.scores or self.analyses)


class Engine:
    """Runs sequences until they end. For one thread; knows nothing of HTTP or of queues between threads."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        load: LoadControl | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        self.runner = runner
        self.clock = clock
        self.pace = Pace()
        self._scheduler = scheduler
        self._metrics = metrics
        self.load = load or LoadControl(math.inf)
        self._deadlines = deadlines or Deadlines()
        self._unbooked: list[Outcome] = []
        self._booked = -math.inf

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not (self._scheduler.running or self._scheduler.waiting)

    def reserve(self, sequence: Sequence) -> int:
        """Operations that a new sequence may come to."""
        generated = sequence.params.max_tokens
        full = self.runner.cost.full_flops(len(sequence.prompt) + generated, generated)
        return round(sequence.grant.granted * full)

    def add(self, sequences: Collection[Sequence]) -> None:
        """Queue new sequences; all choices of one prompt together."""
        self._adapt(self.clock())  # nobody has noticed how calm it was while there was nothing to do
        for sequence in sequences:
            if sequence.grant.flexible and self.load.ease < 1.0:
                sequence.grant = sequence.grant.at(self.load.ease, self.runner.cost)
            sequence.reserved = self.reserve(sequence)
            self._scheduler.add(sequence)
            self._metrics.decisions[sequence.grant.reason.value].inc()
        self.book()

    def step(self) -> list[Output]:
        """Run one step; what became of the sequences in it."""
        began = self.clock()
        outputs = self._expire(began)
        self._adapt(began)
        batch = self._scheduler.schedule()
        self._begin(batch, began)
        scheduled = self.clock()
        ran = self._run(batch)
        run_end = self.clock()
        outputs += [self._postprocess(sequence, outcome, run_end) for sequence, outcome in ran]
        self._account(ran, run_end - scheduled, run_end)
        parts = {"schedule": scheduled - began, "run": run_end - scheduled, "postprocess": self.clock() - run_end}
        for part, seconds in parts.items():
            self._metrics.step[part].observe(seconds)
        return outputs

    def end(self, sequence: Sequence, reason: FinishReason) -> Output | None:
        """End a sequence from outside, whatever it is doing; None if it has ended already."""
        if sequence.finish is not None:
            return None
        sequence.finish = reason
        self._close(sequence, self.clock())
        self.book()
        return Output(sequence, sequence.text.flush(), reason)

    def end_all(self, reason: FinishReason) -> list[Output]:
        """End every sequence."""
        return self._end((*self._scheduler.running, *self._scheduler.waiting), reason)

    def book(self) -> None:
        """Bring counters and gauges up to date, which may be a moment behind while nothing begins or ends."""
        metrics, outcomes = self._metrics, self._unbooked
        self._unbooked = []
        for phase in Phase:
            some = [outcome for outcome in outcomes if outcome.phase is phase]
            if some:
                flops, full_flops = (outcome.flops for outcome in some), sum(outcome.full_flops for outcome in some)
                metrics.spent(flops, full_flops, phase.value)
        metrics.prompt_tokens.inc(sum(o.positions for o in outcomes if o.phase is Phase.PREFILL))
        metrics.generation_tokens.inc(sum(outcome.token is not None for outcome in outcomes))
        metrics.running.set(len(self._scheduler.running))
        metrics.waiting.set(len(self._scheduler.waiting))
        for kind, count in self.runner.state_bytes.items():
            metrics.state_bytes[kind].set(count)
        metrics.state_buffers.set(self.runner.buffer_bytes)

    def check_integrity(self) -> None:
        """Assert that slots and sequences match."""
        self._scheduler.check_integrity()
        self.runner.check_integrity(
            {sequence.slot for sequence in self._scheduler.running if sequence.slot is not None}
        )

    def _end(self, sequences: Iterable[Sequence], reason: FinishReason) -> list[Output]:
        return [output for sequence in sequences if (output := self.end(sequence, reason)) is not None]

    def _expire(self, now: float) -> list[Output]:
        """End what has waited or run for too long."""
        waiting, running = self._scheduler.waiting, self._scheduler.running
        waited = [sequence for sequence in waiting if now - sequence.arrived > self._deadlines.queue]
        late = [s for s in (*waiting, *running) if now - s.arrived > self._deadlines.request]
        return self._end(waited, FinishReason.QUEUE_TIMEOUT) + self._end(late, FinishReason.TIMEOUT)

    def _adapt(self, now: float) -> None:
        """Lower or raise what flexible sequences are granted, by how long others wait."""
        waiting = self._scheduler.waiting
        longest = max((now - sequence.arrived for sequence in waiting), default=0.0)
        before = self.load.ease
        if not self.load.update(now, longest):
            return
        cause = "load_lowered" if self.load.ease < before else "load_raised"
        for sequence in (*self._scheduler.running, *waiting):
            if sequence.grant.flexible and sequence.regrant(sequence.grant.at(self.load.ease, self.runner.cost)):
                self._metrics.retile[cause].inc()

    def _begin(self, batch: Batch, now: float) -> None:
        """Do what comes before the step: sequences that start, and states that shrink."""
        for sequence, before, after in batch.resize:
            self.runner.resize(sequence)
            self._metrics.state_resize[before, after].inc()
        for sequence in (*batch.prefill, *batch.fork):
            if sequence.scheduled is None:
                sequence.scheduled = now
                if sequence in batch.prefill:
                    self.runner.resume(sequence)
                    self._metrics.cached_tokens.inc(sequence.inherited)
        if batch.prefill or batch.fork or batch.resize:
            self.book()

    def _run(self, batch: Batch) -> Ran:
        """Run the model. Where it fails, only those fail that it worked on."""
        began = self.clock()
        ran = [(sequence, self._try_fork(sequence)) for sequence in batch.fork]
        ran += zip(batch.prefill, self.runner.prefill(batch.prefill), strict=True)
        read = self.clock()
        if batch.decode:
            try:
                ran += zip(batch.decode, self.runner.decode(batch.decode), strict=True)
            except Exception:
                logger.exception("a decoding step failed; its %d sequences end", len(batch.decode))
                ran += [(sequence, None) for sequence in batch.decode]
            self._scheduler.charge(read - began, self.clock() - read)
        return ran

    def _try_fork(self, sequence: Sequence) -> Outcome | None:
        try:
            return self.runner.fork(sequence)
        except Exception:
            logger.exception("starting a choice failed; it ends")
            return None

    def _postprocess(self, sequence: Sequence, outcome: Outcome | None, now: float) -> Output:
        """Book what a step did for one sequence, and end the sequence if it is done."""
        if outcome is None:
            sequence.finish = FinishReason.ERROR
            self._close(sequence, now)
            return Output(sequence, sequence.text.flush(), sequence.finish)
        sequence.account(outcome.flops, outcome.full_flops)
        for size in sequence.close_tiles(outcome.tile_ends):
            self._metrics.tile_size.observe(size)
        sequence.positions += outcome.positions
        if outcome.phase is Phase.PREFILL:
            self._read_on(sequence, outcome)
        text = sequence.finish_reading() if outcome.token is None else self._accept(sequence, outcome.token, now)
        if sequence.finish is not None:
            self._close(sequence, now)
        analyses = [] if outcome.analysis is None else [outcome.analysis]
        return Output(sequence, text, sequence.finish, outcome.scores, analyses)

    def _read_on(self, sequence: Sequence, outcome: Outcome) -> None:
        """Book tokens of a prompt; at its end, let the other choices start."""
        sequence.read += outcome.positions
        shared = sequence.shared
        if shared is None:
            return
        if shared.reader is sequence:
            shared.scores += outcome.scores if outcome.token is None else outcome.scores[:-1]
            if sequence.prefilled:
                shared.finish_reading(sequence)
        elif not shared.kept:
            self.runner.drop_end(shared)

    def _accept(self, sequence: Sequence, token: int, now: float) -> str:
        """Add a token to a sequence; the text that may be sent now."""
        sequence.phase = Phase.DECODE
        text = sequence.accept(token)
        if sequence.latest_token is None:
            sequence.first_token = now
            self._metrics.first_token.observe(now - sequence.arrived)
        else:
            self._metrics.inter_token.observe(now - sequence.latest_token)
        sequence.latest_token = now
        return text

    def _account(self, ran: Ran, seconds: float, now: float) -> None:
        """Book what a step did in all: at once if sequences began or ended, else in good time."""
        outcomes = [outcome for _, outcome in ran if outcome is not None]
        decoded = [outcome for outcome in outcomes if outcome.phase is Phase.DECODE]
        if decoded:
            self._metrics.batch_size.observe(len(decoded))
            self._metrics.trunk_batch_size.observe(sum(len(outcome.tile_ends) for outcome in decoded))
        self.pace.worked(sum(outcome.flops.total for outcome in outcomes), seconds)
        self._unbooked += outcomes
        calm = len(decoded) == len(ran) and all(sequence.finish is None for sequence, _ in ran)
        if not calm or now - self._booked >= _BOOKING_SECONDS:
            self._booked = now
            self.book()

    def _close(self, sequence: Sequence, now: float) -> None:
        """Give back what a sequence held, and record its end."""
        slot = self._scheduler.remove(sequence)
        if slot is not None:
            self.runner.release(slot)
        if sequence.shared is not None and not sequence.shared.kept:
            self.runner.drop_end(sequence.shared)
        assert sequence.finish is not None, "only what has ended is closed"
        if sequence.finish in (FinishReason.STOP, FinishReason.LENGTH):
            self.pace.ended(sequence.flops.total, sequence.reserved)
        self._record_end(sequence, sequence.finish, now)

    def _record_end(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        metrics, usage = self._metrics, sequence.usage()
        metrics.finished[reason.value].inc()
        metrics.request.observe(now - sequence.arrived)
        for kind, value in (("requested", usage.requested), ("granted", usage.granted), ("spent", usage.spent)):
            if kind != "spent" or usage.full_flops:
                metrics.ratio[kind].observe(value)
        if sequence.scheduled is not None:
            metrics.queue.observe(sequence.scheduled - sequence.arrived)
            if sequence.first_token is not None:
                metrics.prefill.observe(sequence.first_token - sequence.scheduled)
                metrics.decode.observe(now - sequence.first_token)
