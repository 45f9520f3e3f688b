"""Matrices for compiled decoding steps: in bf16 too, where that loses nothing.

A step of one stream reads every weight once and computes little with it, so that it takes as long as reading does. Many
models are published in bf16; held so, their weights are half as much to read, and each is widened to the very number
that every other path computes with.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = tuple[NDArray[np.float32], NDArray[np.uint16]]
"""As :func:`readable` gives it."""

_NO_WORDS = np.empty((0, 0), np.uint16)
NO_MATRIX: Matrix = np.empty((0, 0), np.float32), _NO_WORDS
"""What stands for a matrix that a model does not have."""


def exact_in_bf16(weight: Tensor) -> bool:
    """Whether every number of ``weight`` is one that bf16 has."""
    return torch.equal(weight, weight.to(torch.bfloat16).to(weight.dtype))


def readable(weight: Tensor, *, frozen: bool) -> Matrix:
    """``weight`` [V, D] in fp32, sharing its memory, and its bf16 numbers as uint16 [V, D]; [0, 0] where they differ.

    Args:
        weight: on a CPU. frozen: whether its numbers stay as they are, so that a copy may stand for them.
    """
    weight = weight.detach()
    packed = frozen and exact_in_bf16(weight)
    return weight.numpy(), weight.to(torch.bfloat16).view(torch.uint16).numpy() if packed else _NO_WORDS
