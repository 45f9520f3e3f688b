"""A runner without a model, and sequences and engines for it."""

from __future__ import annotations

from collections.abc import Callable

from model.cost import CostModel, Flops
from service.engine.budget import ComputeBudget, grant
from service.engine.engine import Engine
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import Outcome, Phase, SamplingParams, Sequence, SharedPrompt
from service.metrics import Metrics
from tests.service.servers import TINY

COST = CostModel(TINY)
SIZES = {4: 100, 8: 160}
"""Bytes of a state by its columns."""
BLOCK = 2


def make_sequence(
    prompt: int = 5,
    max_tokens: int = 3,
    budget: float = 1.0,
    *,
    least: float | None = None,
    priority: int = 0,
    arrived: float = 0.0,
    **params: object,
) -> Sequence:
    """A sequence of so many prompt tokens."""
    given = grant(ComputeBudget(budget, least or budget), COST)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)
    return Sequence([65] * prompt, sampling, given, arrived=arrived, priority=priority)


def make_choices(n: int, **kwargs: object) -> list[Sequence]:
    """Choices of one prompt."""
    choices, shared = [make_sequence(**kwargs) for _ in range(n)], SharedPrompt()
    for number, sequence in enumerate(choices):
        sequence.choice, sequence.shared = number, shared
    return choices


def make_limits(slots: int = 2, **options: object) -> Limits:
    return Limits.for_states(SIZES, running=slots, block_size=BLOCK, **options)


def make_engine(
    runner: FakeRunner, clock: Callable[[], float], slots: int = 2, **options: object
) -> tuple[Engine, Metrics]:
    """An engine around a runner; options are those of the limits and of the engine."""
    names = ("state_bytes", "prefill_share", "decode_stretch")
    limits = {name: options.pop(name) for name in names if name in options}
    metrics = Metrics("fake", sorted(SIZES))
    return Engine(runner, Scheduler(make_limits(slots, **limits), SIZES), metrics, clock, **options), metrics


class FakeRunner:
    """Reads prompts two tokens at a time, and generates the letter a; fails on request, and checks what it is asked."""

    def __init__(self) -> None:
        self.cost = COST
        self.held: dict[int, int] = {}
        """Columns by slot."""
        self.ends: set[SharedPrompt] = set()
        self.log: list[str] = []
        self.fail_prefill = self.fail_decode = self.fail_fork = False
        self.not_finite: set[Sequence] = set()

    @property
    def state_bytes(self) -> dict[str, int]:
        ends = sum(SIZES[end.columns or max(SIZES)] for end in self.ends)
        return {"used": sum(SIZES[columns] for columns in self.held.values()) + ends}

    buffer_bytes = 0

    def resume(self, sequence: Sequence) -> None:
        assert sequence.read == 0
        assert sequence.slot not in self.held

    def prefill(self, sequences: list[Sequence]) -> list[Outcome | None]:
        return [self.read_block(sequence) for sequence in sequences]

    def close(self) -> None:
        pass

    def read_block(self, sequence: Sequence) -> Outcome | None:
        assert sequence.slot is not None
        assert sequence.phase is Phase.PREFILL
        assert self.held.setdefault(sequence.slot, sequence.columns) == sequence.columns
        self.log.append(f"prefill {sequence.slot}")
        if self.fail_prefill:
            return None
        count = min(BLOCK, len(sequence.prompt) - sequence.read)
        last = sequence.read + count == len(sequence.prompt)
        if last and sequence.shared is not None and sequence.shared.waiting:
            self.ends.add(sequence.shared)
        token = 97 if last and sequence.params.max_tokens else None
        return Outcome(Phase.PREFILL, count, Flops(encoder=10 * count), 20 * count, token=token)

    def fork(self, sequence: Sequence) -> Outcome:
        assert sequence.slot is not None
        assert sequence.shared in self.ends
        assert sequence.slot not in self.held
        self.held[sequence.slot] = sequence.columns
        self.log.append(f"fork {sequence.slot}")
        if self.fail_fork:
            raise RuntimeError("planted")
        sequence.inherit(len(sequence.prompt), sequence.shared.last_fire)
        return Outcome(Phase.PREFILL, 0, Flops(), 0, token=97 if sequence.params.max_tokens else None)

    def decode(self, sequences: list[Sequence]) -> list[Outcome | None]:
        self.log.append(f"decode {' '.join(str(sequence.slot) for sequence in sequences)}")
        for sequence in sequences:
            assert self.held[sequence.slot] == sequence.columns
        if self.fail_decode:
            raise MemoryError("planted")
        outcome = Outcome(Phase.DECODE, 1, Flops(encoder=10, trunk=5), 20, [0], 97)
        return [None if sequence in self.not_finite else outcome for sequence in sequences]

    def resize(self, sequence: Sequence) -> None:
        if sequence.slot in self.held:
            self.held[sequence.slot] = sequence.columns

    def release(self, slot: int) -> None:
        self.held.pop(slot, None)

    def drop_end(self, prompt: SharedPrompt) -> None:
        self.ends.discard(prompt)

    def check_integrity(self, slots: set[int]) -> None:
        assert set(self.held) <= slots
        assert all(end.kept for end in self.ends)
