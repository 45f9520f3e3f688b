"""Sharing compiled loops, which run without the interpreter's lock, among threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import numpy as np
import torch

_chosen = threading.local()


def loop_threads() -> int:
    """Among how many threads the calling thread shares its loops: what it has chosen, or as many as torch uses."""
    threads: int = getattr(_chosen, "threads", 0)
    return threads or torch.get_num_threads()


def set_loop_threads(count: int) -> None:
    """Choose it, for the calling thread only."""
    _chosen.threads = count


def share(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Do ``work(start, end)`` for parts of 0 .. count on up to ``threads`` threads, this one included.

    A part's result must not depend on the cuts.
    """
    bounds = np.linspace(0, count, min(threads, count) + 1).astype(int).tolist()
    others = [_pool(threads).submit(work, start, end) for start, end in pairwise(bounds[1:])]
    work(*bounds[:2])
    for other in others:
        other.result()


@contextmanager
def own_threads() -> Iterator[None]:
    """Only :func:`share` uses several threads in here: as many as it would have, and tensor operations one.

    Torch's threads wait busily for the next operation, on the cores where a share is to be done.
    """
    before, chosen = torch.get_num_threads(), getattr(_chosen, "threads", 0)
    if before == 1:
        yield
        return
    _chosen.threads = loop_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _chosen.threads = chosen


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose tensor operations run on one thread each."""
    before, started = torch.get_num_threads(), threading.Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, "loops", initializer=torch.set_num_threads, initargs=(1,))
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(before)  # setting it in one thread decides for threads to come as well
    return pool
