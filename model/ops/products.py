"""In which precision matrix products of fp32 tensors are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


def multiplies_bf16() -> bool:
    """Whether this CPU has units for matrix products in bfloat16 (AMX); without, they take far longer than in fp32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@contextmanager
def products(precision: Literal["highest", "medium"]) -> Iterator[None]:
    """Compute matrix products of fp32 tensors in fp32 (``highest``), or in bfloat16 with sums in fp32 (``medium``)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
