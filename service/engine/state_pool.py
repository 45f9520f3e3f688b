"""The model states of running sequences."""

from __future__ import annotations

import torch

from model.lm import AdaptiveAttentionSystem
from model.state import ModelState


class StatePool:
    """States by slot: alone while a prompt is read, together in one batch while tokens are generated.

    The batch stays as it is from step to step and is rebuilt only when a sequence joins or leaves, so that the states,
    the largest thing that generation touches, are not copied at every step.
    """

    def __init__(self, model: AdaptiveAttentionSystem) -> None:
        self._model = model
        self._alone: dict[int, ModelState] = {}
        self._slots: list[int] = []
        self._batch: ModelState | None = None
        self.bytes_per_sequence = model.allocate_state(1).nbytes

    @property
    def held(self) -> set[int]:
        """Slots that have a state."""
        return {*self._alone, *self._slots}

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return self.bytes_per_sequence * len(self.held)

    def alone(self, slot: int) -> ModelState:
        """The state of one sequence, by itself; a new one if the slot has none."""
        assert slot not in self._slots, "a sequence does not go back to reading its prompt"
        if slot not in self._alone:
            self._alone[slot] = self._model.allocate_state(1)
        return self._alone[slot]

    def batch(self, slots: list[int]) -> ModelState:
        """The states of ``slots``, one row each: those in the batch so far, in their order, then those that join it."""
        joining = slots[len(self._slots) :]
        assert slots[: len(self._slots)] == self._slots, "sequences join at the end and leave by release"
        if joining:
            parts = [] if self._batch is None else [self._batch]
            self._batch = ModelState.concatenate([*parts, *(self._alone.pop(slot) for slot in joining)])
            self._slots = list(slots)
        assert self._batch is not None, "a batch has at least one sequence"
        return self._batch

    def release(self, slot: int) -> None:
        """Drop the state of a slot, if it has one."""
        self._alone.pop(slot, None)
        if slot in self._slots:
            rows = [row for row, other in enumerate(self._slots) if other != slot]
            index = torch.tensor(rows, dtype=torch.int64, device=self._model.device)
            self._batch = self._batch.gather(index) if self._batch is not None and rows else None
            self._slots.remove(slot)

    def check_integrity(self) -> None:
        """Assert that no slot is in two places and that the batch has one row per slot."""
        assert len(set(self._slots)) == len(self._slots)
        assert not set(self._slots) & set(self._alone)
        rows = 0 if self._batch is None else self._batch.router.positions.shape[0]
        assert rows == len(self._slots)
