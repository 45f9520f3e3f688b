"""What can go wrong in training, and what to say about it.

``TrainingError`` is about what was asked for, ``BrokenRunError`` about a run that broke off.
"""

from __future__ import annotations

from pathlib import Path

import torch


class TrainingError(ValueError):
    """A run cannot start or continue as asked."""


class BrokenRunError(RuntimeError):
    """A run broke off; what it had saved before is whole."""


def explain(error: Exception, folder: Path, step: int, saved: int | None) -> BrokenRunError | None:
    """What broke a run off in step ``step`` and how to go on, or None if the error is none of those that can be met.

    Args:
        folder: of the run. saved: the step whose state the folder holds, None for no state.
    """
    kept = f"nothing was saved in {folder} yet" if saved is None else f"the state of step {saved} in {folder} is whole"
    if isinstance(error, FloatingPointError):
        return BrokenRunError(
            f"{error}; {kept}. Resumed, the run would read the same bytes and get here again: start another one, with "
            + ("" if saved is None else f"--initial {folder}, ")
            + "a lower --learning-rate or another --seed"
        )
    if out_of_memory(error):
        return BrokenRunError(
            f"out of memory in step {step}; {kept}. --checkpointing needs less, and may be given with --resume; lower "
            "--sequences or --length need less too, but make another run"
        )
    resume = "" if saved is None else ", and --resume goes on from it once that is mended"
    if isinstance(error, ConnectionError):
        return BrokenRunError(f"{error} in step {step}; {kept}{resume}")
    if isinstance(error, OSError):
        return BrokenRunError(f"cannot write to {folder}: {error.strerror or error}; {kept}{resume}")
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: the GPU's, the CPU's (which raises a plain RuntimeError), or Python's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
