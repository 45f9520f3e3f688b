"""Sharing compiled loops, which run without the interpreter's lock, among threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="loops")
