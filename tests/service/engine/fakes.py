"""A runner without a model, and sequences for it."""

from __future__ import annotations

from model.cost import CostModel, Flops
from service.engine.budget import ComputeBudget, grant
from service.engine.sequence import Outcome, SamplingParams, Sequence
from tests.service.servers import TINY

COST = CostModel(TINY)


def make_sequence(prompt: int = 5, max_tokens: int = 3, budget: float = 1.0, **params: object) -> Sequence:
    """A sequence of so many prompt tokens."""
    given = grant(ComputeBudget.exactly(budget), COST)
    return Sequence([65] * prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0, **params), given, arrived=0.0)


class FakeRunner:
    """Reads prompts two tokens at a time, and generates the letter a; fails on request."""

    def __init__(self) -> None:
        self.cost = COST
        self.held: set[int] = set()
        self.log: list[str] = []
        self.fail_prefill = self.fail_decode = False

    @property
    def state_bytes(self) -> int:
        return len(self.held)

    def prefill(self, sequence: Sequence) -> Outcome:
        assert sequence.slot is not None
        self.held.add(sequence.slot)
        self.log.append(f"prefill {sequence.slot}")
        if self.fail_prefill:
            raise RuntimeError("planted")
        count = min(2, len(sequence.prompt) - sequence.read)
        last = sequence.read + count == len(sequence.prompt)
        return Outcome(count, Flops(encoder=10 * count), 20 * count, token=97 if last else None)

    def decode(self, sequences: list[Sequence]) -> list[Outcome]:
        self.log.append(f"decode {' '.join(str(sequence.slot) for sequence in sequences)}")
        if self.fail_decode:
            raise RuntimeError("planted")
        return [Outcome(1, Flops(encoder=10, trunk=5), 20, [0], 97) for _ in sequences]

    def release(self, slot: int) -> None:
        self.held.discard(slot)

    def check_integrity(self, slots: set[int]) -> None:
        assert self.held <= slots
