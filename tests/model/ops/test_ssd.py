from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ops import ssd
from model.ops.ssd import ssd_reference, ssd_scan

H, P, N = 3, 4, 5


def inputs(length: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "x": normal(2, length, H, P), "dt": normal(2, length, H).exp(), "A": -normal(H).exp(),
        "B": normal(2, length, N), "C": normal(2, length, N), "initial_state": normal(2, H, P, N),
    }  # fmt: skip


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_the_chunked_scan_equals_the_recurrence(length: int, chunk_size: int) -> None:
    values = inputs(length)
    y, final = ssd_reference(**values)
    scan = ssd_scan(**values, chunk_size=chunk_size)
    torch.testing.assert_close(scan.y, y, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(scan.final_state, final, atol=1e-10, rtol=1e-10)


def test_states_before_chunks_are_those_of_the_recurrence() -> None:
    values = inputs(30)
    scan = ssd_scan(**values, chunk_size=8)
    for chunk in range(1, 4):
        prefix = {k: v[:, : 8 * chunk] if k not in ("A", "initial_state") else v for k, v in values.items()}
        torch.testing.assert_close(scan.chunk_states[:, chunk], ssd_reference(**prefix)[1], atol=1e-10, rtol=1e-10)


@settings(max_examples=20)
@given(st.integers(1, 39))
def test_a_scan_cut_anywhere_and_carried_on_is_the_same(cut: int) -> None:
    values = inputs(40)
    whole = ssd_scan(**values, chunk_size=8)
    state, outputs = values["initial_state"], []
    for piece in (slice(0, cut), slice(cut, 40)):
        part = {name: values[name][:, piece] for name in ("x", "dt", "B", "C")}
        scan = ssd_scan(**part, A=values["A"], initial_state=state, chunk_size=8)
        outputs.append(scan.y)
        state = scan.final_state
    torch.testing.assert_close(torch.cat(outputs, 1), whole.y, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state, whole.final_state, atol=1e-10, rtol=1e-10)


def test_gradients_are_those_of_the_recurrence_and_finite_under_strong_decay() -> None:
    values = {name: value.requires_grad_() for name, value in inputs(20).items()}
    outputs = (ssd_reference(**values)[0], ssd_scan(**values, chunk_size=8).y)
    gradients = [torch.autograd.grad(y.square().sum(), list(values.values())) for y in outputs]
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8)
    strong = {name: value.detach() for name, value in inputs(64, torch.float32).items()}
    strong["dt"] = (strong["dt"] * 1e4).requires_grad_()
    ssd_scan(**strong, chunk_size=64).y.sum().backward()
    assert strong["dt"].grad is not None
    assert strong["dt"].grad.isfinite().all()


@pytest.mark.parametrize("strength", [1.0, 1e4])
def test_states_passed_at_once_are_those_passed_one_by_one_and_so_are_gradients(strength: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"initial": (2, H, P, N), "added": (2, 6, H, P, N), "log_decay": (2, 6, H)}
    values = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    values["log_decay"] = -strength * values["log_decay"].abs()
    for value in values.values():
        value.requires_grad_()
    one_by_one, at_once = (one(**values) for one in (ssd._pass_one_by_one, ssd._pass_at_once))
    torch.testing.assert_close(at_once, one_by_one, atol=1e-12, rtol=1e-12)
    weights = torch.randn(one_by_one.shape, generator=generator, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((states * weights).sum(), list(values.values())) for states in (one_by_one, at_once)
    ]
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
