"""Threads that run the model side by side. On a CPU its loops and matrix products leave the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Inline(Executor):
    """Runs everything at once, in the thread that asks: the plain twin of a pool of threads."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future that has ended."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def make_workers(count: int, prepare: Callable[[], object]) -> Executor:
    """Something that runs ``count`` pieces of work side by side; threads call ``prepare`` first."""
    return Inline() if count == 1 else ThreadPoolExecutor(count, thread_name_prefix="model", initializer=prepare)
