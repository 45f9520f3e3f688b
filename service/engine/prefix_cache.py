"""States at block boundaries of prompts that were read before. Knows nothing of what a state is."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[S]):
    """What was known after some blocks of a prompt."""

    state: S
    positions: int
    last_fire: int
    nbytes: int


def extend_key(key: bytes, tokens: Sequence[int], rate: float, depth: int | None) -> bytes:
    """The key of the prefix ``key`` and one more block, read at so many fires per token.

    ``depth``: blocks after which the stage ends that is placed, None for all.
    """
    content = struct.pack(f"<dI{len(tokens)}I", rate, depth or 0, *tokens)
    return hashlib.blake2b(content, key=key, digest_size=32).digest()


def first_key(salt: str) -> bytes:
    """The key of the empty prefix. Prompts are found again under the same salt only, so that no client can tell from
    the time of an answer what another one asked (CVE-2025-46570).
    """
    return hashlib.blake2b(salt.encode(), digest_size=32).digest()


class PrefixCache(Generic[S]):
    """The most recently used snapshots, at most ``max_bytes`` of them. For one model and one thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._snapshots: OrderedDict[bytes, Snapshot[S]] = OrderedDict()
        self.nbytes = 0

    @property
    def enabled(self) -> bool:
        """Whether it holds anything at all."""
        return self._max_bytes > 0

    def find(self, key: bytes) -> Snapshot[S] | None:
        """The snapshot under a key, which is now the most recently used."""
        found = self._snapshots.get(key)
        if found is not None:
            self._snapshots.move_to_end(key)
        return found

    def store(self, key: bytes, snapshot: Snapshot[S]) -> None:
        """Remember a snapshot, and forget the least recently used ones that are then too many."""
        known = self._snapshots.pop(key, None)
        self.nbytes += snapshot.nbytes - (known.nbytes if known is not None else 0)
        self._snapshots[key] = snapshot
        while self.nbytes > self._max_bytes:
            _, oldest = self._snapshots.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def check_integrity(self) -> None:
        """Assert that bytes are counted right and are within bounds."""
        assert self.nbytes == sum(snapshot.nbytes for snapshot in self._snapshots.values()) <= max(self._max_bytes, 0)
