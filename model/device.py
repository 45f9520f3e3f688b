"""Which device to run on, and with how many threads."""

from __future__ import annotations

import os

import torch


def choose_device(name: str) -> str:
    """``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``; ``auto`` takes the GPU if there is one.

    Raises:
        ValueError: ``cuda`` is asked for and there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch finds no CUDA device")
    return name


def set_threads(count: int | None) -> None:
    """CPU threads of every matrix product in this process; None leaves the choice to torch."""
    if count is not None:
        torch.set_num_threads(count)


def core_count() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
