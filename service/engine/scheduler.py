"""Who runs in the next step. Plain Python: no tensors, no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from service.engine.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """The work of one engine step."""

    prefill: Sequence | None
    """Reads one more block of its prompt."""
    decode: list[Sequence]
    """Generate one token each."""

    def __len__(self) -> int:
        return len(self.decode) + (self.prefill is not None)


class Scheduler:
    """First come, first served; one prompt block per step between the decoding of all others.

    A prompt thus delays running streams by one block at most, and a stream never starves a prompt.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._free = list(range(slots - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """Give free slots to waiting sequences, and pick the work of the next step."""
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            sequence.slot = self._free.pop()
            self.running.append(sequence)
        prefill = next((sequence for sequence in self.running if sequence.phase is Phase.PREFILL), None)
        return Batch(prefill, [sequence for sequence in self.running if sequence.phase is Phase.DECODE])

    def remove(self, sequence: Sequence) -> int | None:
        """Forget a sequence; the slot that it gave back, if it had one. Unknown sequences are ignored."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence not in self.running:
            return None
        self.running.remove(sequence)
        slot, sequence.slot = sequence.slot, None
        assert slot is not None, "a running sequence has a slot"
        self._free.append(slot)
        return slot

    def check_integrity(self) -> None:
        """Assert that every slot is free or held by exactly one running sequence."""
        held = [sequence.slot for sequence in self.running]
        assert sorted([*self._free, *(slot for slot in held if slot is not None)]) == list(range(self._slots))
        assert None not in held
        assert all(sequence.slot is None and sequence.finish is None for sequence in self.waiting)
        assert all(sequence.finish is None for sequence in self.running)
