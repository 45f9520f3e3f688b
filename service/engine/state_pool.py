"""The model states of running sequences."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.lm import AdaptiveAttentionSystem
from model.state import ModelState

_SMALLEST = 4
"""Rows that an arena begins with, and that a part of it has at least."""


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences that a step runs over."""

    slots: list[int]
    states: ModelState
    rows: Tensor | None
    """[n] int64, where in ``states`` they are; None where they are all of it."""


class Arena:
    """States of one width, one row each, without gaps: what a decoding step runs over.

    Joining and leaving copy one row: the last one fills a gap. The buffer doubles when it is full and halves when three
    quarters of it are empty, so that a row costs O(1) on average.
    """

    def __init__(self, model: AdaptiveAttentionSystem, columns: int) -> None:
        self._model = model
        self._columns = columns
        self._capacity = _SMALLEST
        self._buffer = self._allocate(_SMALLEST)
        self.nbytes = self._buffer.nbytes
        """Bytes of the buffer."""
        self._parts: list[Part] = []
        self.slots: list[int] = []
        """The slot of each row."""

    @property
    def columns(self) -> list[int]:
        """Columns that each row runs at."""
        found: list[int] = self._buffer.columns[: len(self.slots)].tolist()
        return found

    @property
    def depths(self) -> list[int]:
        """Blocks of the trunk that run in each row."""
        found: list[int] = self._buffer.depth[: len(self.slots)].tolist()
        return found

    def parts(self, slots: Collection[int], most: int) -> list[Part]:
        """Those of ``slots`` that are here, in up to ``most`` parts of about equal size.

        Parts have four rows at least: with fewer, reading the weights once more costs more than a second core gains.
        Where everybody takes part they share memory with the buffer and stay the same objects until a row comes or
        goes; otherwise they are rows of it.
        """
        wanted = [row for row, slot in enumerate(self.slots) if slot in slots]
        count = max(1, min(most, len(wanted) // _SMALLEST))
        bounds = itertools.pairwise(len(wanted) * part // count for part in range(count + 1))
        if not wanted:
            return []
        if len(wanted) < len(self.slots):
            return [self._rows(wanted[a:b]) for a, b in bounds]
        if len(self._parts) != count:
            self._parts = [Part(self.slots[a:b], self._buffer.part(a, b), None) for a, b in bounds]
        return self._parts

    def _rows(self, rows: list[int]) -> Part:
        return Part([self.slots[row] for row in rows], self._buffer, torch.tensor(rows, device=self._model.device))

    def add(self, slot: int, state: ModelState) -> None:
        """Copy the state of one sequence into a new row."""
        if len(self.slots) == self._capacity:
            self._reallocate(2 * self._capacity)
        self._buffer.copy_row_(len(self.slots), state, 0)
        self.slots.append(slot)
        self._parts = []

    def take(self, slot: int) -> ModelState:
        """Remove the row of a slot; a copy of it."""
        row = self.slots.index(slot)
        state = self._buffer.gather(torch.tensor([row], device=self._model.device))
        self.remove(slot)
        return state

    def remove(self, slot: int) -> None:
        """Remove the row of a slot."""
        row, last = self.slots.index(slot), len(self.slots) - 1
        if row < last:
            self._buffer.copy_row_(row, self._buffer, last)
            self.slots[row] = self.slots[last]
        self.slots.pop()
        self._parts = []
        if self._capacity > _SMALLEST and len(self.slots) <= self._capacity // 4:
            self._reallocate(self._capacity // 2)

    def _allocate(self, rows: int) -> ModelState:
        return self._model.allocate_state(rows, d_state=self._columns)

    def _reallocate(self, capacity: int) -> None:
        grown = self._allocate(capacity)
        grown.part(0, len(self.slots)).copy_(self._buffer.part(0, len(self.slots)))
        self._buffer, self._capacity, self.nbytes = grown, capacity, grown.nbytes


@dataclass(frozen=True, slots=True)
class PromptEnd:
    """Where several choices start."""

    state: ModelState
    """Of one sequence; not changed."""
    logits: Tensor | None
    """[V] after the prompt's last token; None where no token is wanted."""


class StatePool:
    """States by slot: alone while a prompt is read, in the arena of their width while tokens are generated."""

    def __init__(self, model: AdaptiveAttentionSystem) -> None:
        self._model = model
        self._alone: dict[int, ModelState] = {}
        self._widths: dict[int, int] = {}
        self._depths: dict[int, int] = {}
        self._ends: dict[Hashable, PromptEnd] = {}
        self._arenas = {columns: Arena(model, columns) for columns in model.config.d_state_levels}
        self.sizes = {n: model.allocate_state(1, d_state=n).nbytes for n in model.config.d_state_levels}
        """Bytes of one state by its columns."""

    @property
    def held(self) -> set[int]:
        """Slots that have a state."""
        return set(self._widths)

    @property
    def used_bytes(self) -> int:
        """Bytes of all states."""
        widths = [*self._widths.values(), *(int(end.state.columns) for end in self._ends.values())]
        return sum(self.sizes[columns] for columns in widths)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers of all arenas, whether or not they hold states."""
        return sum(arena.nbytes for arena in self._arenas.values())

    @property
    def arenas(self) -> list[Arena]:
        """Those that hold rows, the widest first."""
        return [arena for _, arena in sorted(self._arenas.items(), reverse=True) if arena.slots]

    def alone(self, slot: int, columns: int) -> ModelState:
        """The state of one sequence, by itself; a new one with so many columns if the slot has none."""
        if slot not in self._widths:
            self._alone[slot] = self._model.allocate_state(1, d_state=columns)
            self._widths[slot] = columns
            self._depths[slot] = self._model.config.trunk_layers
        return self._alone[slot]

    def set_depth(self, slot: int, depth: int | None) -> None:
        """Run the trunk of a slot that has a state with so many blocks from here on; None for all."""
        depth = self._model.config.trunk_layers if depth is None else depth
        if self._depths[slot] == depth:
            return
        joined = slot not in self._alone
        arena = self._arenas[self._widths[slot]]
        state = arena.take(slot) if joined else self._alone[slot]
        self._model.set_depth(state, depth)
        self._depths[slot] = depth
        if joined:
            arena.add(slot, state)

    def put(self, slot: int, state: ModelState) -> None:
        """Give an empty slot a state of one sequence: a copy of its structure; its tensors are shared."""
        assert slot not in self._widths, "the slot is empty"
        self._alone[slot] = state.map(lambda tensor: tensor)
        self._widths[slot] = int(state.columns)
        self._depths[slot] = int(state.depth)

    def join(self, slot: int) -> None:
        """Move a state into its arena, unless it is there."""
        if slot in self._alone:
            self._arenas[self._widths[slot]].add(slot, self._alone.pop(slot))

    def resize(self, slot: int, columns: int) -> None:
        """Go on with so many columns; nothing happens to a slot that has no state yet."""
        if slot not in self._widths or self._widths[slot] == columns:
            return
        joined = slot not in self._alone
        state = self._arenas[self._widths[slot]].take(slot) if joined else self._alone.pop(slot)
        self._model.resize_state_space(state, columns)
        self._widths[slot] = columns
        if joined:
            self._arenas[columns].add(slot, state)
        else:
            self._alone[slot] = state

    def keep_end(self, prompt: Hashable, slot: int, logits: Tensor | None) -> None:
        """Keep the state of a slot, which is alone, as the end of a prompt."""
        self._ends[prompt] = PromptEnd(self._alone[slot].map(lambda tensor: tensor), logits)

    def end(self, prompt: Hashable) -> PromptEnd:
        """The end that was kept of a prompt."""
        return self._ends[prompt]

    def drop_end(self, prompt: Hashable) -> None:
        """Forget the end of a prompt, if it is kept."""
        self._ends.pop(prompt, None)

    def release(self, slot: int) -> None:
        """Drop the state of a slot, if it has one."""
        columns = self._widths.pop(slot, None)
        self._depths.pop(slot, None)
        if columns is not None and self._alone.pop(slot, None) is None:
            self._arenas[columns].remove(slot)

    def check_integrity(self) -> None:
        """Assert that every slot is in one place, at its width."""
        rows = [slot for arena in self._arenas.values() for slot in arena.slots]
        assert sorted([*rows, *self._alone]) == sorted(self._widths)
        for columns, arena in self._arenas.items():
            assert arena.columns == [columns] * len(arena.slots)
            assert all(self._widths[slot] == columns for slot in arena.slots)
            assert arena.depths == [self._depths[slot] for slot in arena.slots]
        for slot, state in self._alone.items():
            assert (state.columns.tolist(), state.depth.tolist()) == ([self._widths[slot]], [self._depths[slot]])
