"""The fused scan and its gradients against those of the plain twin in double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.ops.fused_scan import fused_scan
from model.ops.products import products
from model.ops.ssd import ScanResult, ssd_scan

CHUNK = 16


def scan_inputs(batch: int, length: int, *, scale: float = 0.1) -> dict[str, Tensor]:
    """``scale``: of dt, so of how fast the state forgets."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads, headdim, d_state = 3, 8, 5
    return {
        "x": normal(batch, length, heads, headdim),
        "dt": scale * torch.rand(batch, length, heads, generator=generator) + 1e-3,
        "A": -16.0 * torch.rand(heads, generator=generator) - 1e-2,
        "B": normal(batch, length, d_state),
        "C": normal(batch, length, d_state),
        "initial_state": normal(batch, heads, headdim, d_state),
    }


def run(scan: Callable[..., ScanResult], inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, last state, states before the chunks, and the gradients of a weighted sum of the first two."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    result = scan(**leaves, chunk_size=CHUNK)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator).to(dtype)).sum()
        for value in (result.y, result.final_state)
    )
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return [result.y.detach(), result.final_state.detach(), result.chunk_states.detach(), *gradients]


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, CHUNK), (2, CHUNK + 1), (3, 5 * CHUNK - 1)])
def test_results_and_gradients_are_those_of_the_plain_twin(batch: int, length: int, scale: float) -> None:
    inputs = scan_inputs(batch, length, scale=scale)
    expected, found = run(ssd_scan, inputs, torch.float64), run(fused_scan, inputs, torch.float32)
    for exact, mine in zip(expected, found, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, atol=2e-5 * max(1.0, float(exact.abs().max())), rtol=0.0)


def test_outputs_alone_may_be_asked_for_their_gradient() -> None:
    inputs = scan_inputs(2, 40)
    found = []
    for scan in (ssd_scan, fused_scan):
        x = inputs["x"].clone().requires_grad_()
        y = scan(**{**inputs, "x": x}, chunk_size=CHUNK).y
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_views_of_a_larger_tensor_are_read_where_they_are() -> None:
    inputs = scan_inputs(2, 40)
    whole = torch.randn(2, 40, 3 * 8 + 10, generator=torch.Generator().manual_seed(2))
    found = []
    for scan in (ssd_scan, fused_scan):
        leaf = whole.clone().requires_grad_()
        x, B, C = leaf.split([24, 5, 5], dim=-1)
        y = scan(**{**inputs, "x": x.unflatten(-1, (3, 8)), "B": B, "C": C}, chunk_size=CHUNK).y
        found.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_states_and_their_sums_stay_in_fp32_where_other_products_do_not() -> None:
    inputs = scan_inputs(2, 40)
    exact = run(fused_scan, inputs, torch.float32)
    with products("medium"):
        found = run(fused_scan, inputs, torch.float32)
    for mine, expected in zip(found, exact, strict=True):
        assert torch.equal(mine, expected)
