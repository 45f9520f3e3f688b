"""Who runs in the next step, and in how much memory. Plain Python: no tensors, no clock."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from service.engine.sequence import Phase, Sequence, SharedPrompt


@dataclass(frozen=True, slots=True)
class Limits:
    """What may run at once."""

    running: int
    """Sequences that hold a state."""
    state_bytes: int
    """Of all states together; at least two whole ones."""
    prefill_share: float
    """Of the time of running streams that reading prompts may take, in (0, 1]."""
    block_size: int
    """Tokens of a prompt that are read at once."""
    blocks: int = 1
    """How many of them are read side by side."""
    decode_stretch: float = math.inf
    """How much more a decoding step may cost than one in which all were as cheap as the cheapest."""

    @classmethod
    def for_states(
        cls,
        state_sizes: Mapping[int, int],
        *,
        running: int,
        block_size: int,
        state_bytes: int | None = None,
        prefill_share: float = 1.0,
        blocks: int = 1,
        decode_stretch: float = math.inf,
    ) -> Limits:
        """Limits with room for ``running`` whole states, unless they say how much room there is."""
        whole = max(state_sizes.values())
        room = max(running, 2) * whole if state_bytes is None else state_bytes
        return cls(running, room, prefill_share, block_size, blocks, decode_stretch)


@dataclass(slots=True)
class Batch:
    """The work of one engine step."""

    prefill: list[Sequence] = field(default_factory=list)
    """Read one more block of their prompts."""
    decode: list[Sequence] = field(default_factory=list)
    """Generate one token each."""
    fork: list[Sequence] = field(default_factory=list)
    """Start where another choice's prompt ended."""
    resize: list[tuple[Sequence, int, int]] = field(default_factory=list)
    """Go on with fewer columns of the trunk's state: how many before, how many from this step on."""

    def __len__(self) -> int:
        return len(self.decode) + len(self.prefill) + len(self.fork)


class Scheduler:
    """Continuous batching, fair in compute.

    Queues are ordered by priority, then by self-clocked fair queueing (Golestani 1994) over the operations that a
    sequence may come to: a cheap one passes expensive ones that came shortly before, and none is passed for ever.

    Prompts are read one block per sequence and step, of all sequences together as much as ``blocks`` blocks at full
    resolution cost, while the time this takes stays within ``prefill_share`` of the time of running streams. What a
    long block takes too much is paid back by steps without any.

    All that generate take every step together, unless their budgets are so far apart that the cheap ones would wait for
    the dear ones: then the dear ones take turns, so that a step costs ``decode_stretch`` times what it would if all
    were as cheap as the cheapest, and each gets the same compute.

    Where a state does not fit any more, the states of sequences that allow less than their target are shrunk.

    Args:
        limits: what may run at once. state_sizes: bytes of one state by the columns that it runs at.
    """

    def __init__(self, limits: Limits, state_sizes: Mapping[int, int]) -> None:
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._sizes = state_sizes
        self._levels = sorted(state_sizes)
        if limits.state_bytes < 2 * state_sizes[self._levels[-1]]:
            least = 2 * state_sizes[self._levels[-1]]
            raise ValueError(f"state_bytes = {limits.state_bytes} must hold two states: at least {least}")
        self._free = list(range(limits.running - 1, -1, -1))
        self._arrivals = itertools.count()
        self._virtual = 0.0
        self._debt = 0.0

    @property
    def state_bytes(self) -> int:
        """Bytes of the states that running sequences hold, and of the ends of prompts kept for choices that wait."""
        shared = {id(s.shared): s.shared for s in (*self.waiting, *self.running) if s.shared is not None}
        kept = sum(self._kept_bytes(prompt) for prompt in shared.values())
        return sum(self._sizes[sequence.columns] for sequence in self.running) + kept

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.columns = self._levels[-1]
        sequence.order = (sequence.priority, self._virtual + sequence.reserved, next(self._arrivals))
        bisect.insort(self.waiting, sequence, key=_order)
        if sequence.shared is not None:
            sequence.shared.waiting += 1

    def schedule(self) -> Batch:
        """Start waiting sequences for which there is room, and pick the work of the next step."""
        batch = Batch()
        blocked = False
        for sequence in tuple(self.waiting) if self._free else ():
            shared = sequence.shared
            if shared is not None and shared.reader is not None and not shared.read:
                continue
            # Behind one that does not fit only those may start for whose sake memory is held.
            if blocked and not (shared is not None and shared.read):
                continue
            if self._free and self._make_room(sequence, batch):
                self._start(sequence, batch)
            else:
                blocked = True
        batch.decode = self._choose_decoding([s for s in self.running if s.phase is Phase.DECODE])
        if not batch.decode:
            self._debt = 0.0
        if self._debt <= 0.0:
            batch.prefill = self._choose_prompts(batch)
        return batch

    def charge(self, prefill_seconds: float, decode_seconds: float) -> None:
        """Take note of how long the parts of a step took."""
        share = self.limits.prefill_share
        if decode_seconds > 0.0:
            self._debt = max(0.0, self._debt + prefill_seconds * (1.0 - share) - decode_seconds * share)

    def remove(self, sequence: Sequence) -> int | None:
        """Forget a sequence; the slot that it gave back, if it had one. Unknown sequences are ignored."""
        shared = sequence.shared
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            if shared is not None:
                shared.waiting -= 1
        if sequence not in self.running:
            return None
        if shared is not None and shared.reader is sequence and not shared.read:
            shared.reader = None
        self.running.remove(sequence)
        slot, sequence.slot = sequence.slot, None
        assert slot is not None, "a running sequence has a slot"
        self._free.append(slot)
        return slot

    def check_integrity(self) -> None:
        """Assert that every slot is free or held by exactly one running sequence, and that states fit."""
        held = [sequence.slot for sequence in self.running]
        assert sorted([*self._free, *(slot for slot in held if slot is not None)]) == list(range(self.limits.running))
        assert None not in held
        assert all(sequence.slot is None for sequence in self.waiting)
        assert all(sequence.finish is None for sequence in (*self.waiting, *self.running))
        assert self.waiting == sorted(self.waiting, key=_order)
        assert self.state_bytes <= self.limits.state_bytes
        for sequence in (*self.waiting, *self.running):
            if sequence.shared is not None:
                assert sequence.shared.waiting == sum(other.shared is sequence.shared for other in self.waiting)

    def _start(self, sequence: Sequence, batch: Batch) -> None:
        """Give a waiting sequence a slot."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.slot = self._free.pop()
        self._virtual = max(self._virtual, sequence.order[1])
        if sequence.shared is None:
            return
        sequence.shared.waiting -= 1
        if sequence.shared.read:
            batch.fork.append(sequence)
        else:
            sequence.shared.reader = sequence

    def _make_room(self, sequence: Sequence, batch: Batch) -> bool:
        """Whether the state of a waiting sequence fits, if need be after shrinking others."""
        shared, spare = sequence.shared, self.limits.state_bytes - self.state_bytes
        if shared is not None and shared.read:
            assert shared.reader is not None, "somebody has read it"
            sequence.columns = shared.columns
            needed = self._sizes[shared.columns] - (self._kept_bytes(shared) if shared.waiting == 1 else 0)
        else:
            others = shared is not None and shared.waiting > 1
            needed = self._sizes[sequence.columns] * (2 if others else 1)
        able = [s for s in self.running if s.grant.flexible and (s.shared is None or s.phase is Phase.DECODE)]
        if spare + sum(self._sizes[s.columns] - self._sizes[self._levels[0]] for s in able) < needed:
            return False
        while spare < needed:
            shrunk = max(able, key=lambda other: (other.columns, other.order))
            columns = self._levels[self._levels.index(shrunk.columns) - 1]
            spare += self._sizes[shrunk.columns] - self._sizes[columns]
            batch.resize.append((shrunk, shrunk.columns, columns))
            shrunk.columns = columns
        return True

    def _choose_decoding(self, decoding: list[Sequence]) -> list[Sequence]:
        """Those that generate in this step: all, or those that have had least compute so far."""
        if not decoding:
            return []
        shares = [sequence.grant.granted for sequence in decoding]
        room = self.limits.decode_stretch * len(shares) * min(shares) + 1e-9
        if sum(shares) <= room:
            return decoding
        # Whoever joins has had as much as the one that has had least.
        least = min((s.compute_had for s in decoding if s.compute_had), default=0.0)
        for sequence in decoding:
            sequence.compute_had = sequence.compute_had or least
        chosen: list[Sequence] = []
        work = 0.0
        for sequence in sorted(decoding, key=lambda s: (s.compute_had, s.order)):
            work += sequence.grant.granted
            if chosen and work > room:
                break
            sequence.compute_had += sequence.grant.granted
            chosen.append(sequence)
        return chosen

    def _kept_bytes(self, shared: SharedPrompt) -> int:
        """Bytes that the end of a shared prompt holds, or will when it has been read."""
        if shared.reader is None or not shared.waiting:
            return 0
        return self._sizes[shared.columns if shared.read else self._levels[-1]]

    def _choose_prompts(self, batch: Batch) -> list[Sequence]:
        """The prompts that are read on: the first in order, and more as long as there is work for all who read."""
        reading = [s for s in self.running if s.phase is Phase.PREFILL and s not in batch.fork]
        chosen: list[Sequence] = []
        work = 0.0
        for sequence in sorted(reading, key=_order):
            tokens = min(self.limits.block_size, len(sequence.prompt) - sequence.read)
            work += tokens * sequence.grant.granted
            if chosen and work > self.limits.block_size * self.limits.blocks:
                break
            chosen.append(sequence)
        return chosen


def _order(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.order
