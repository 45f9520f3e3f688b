from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.layers.mamba2 as model_layers
from model.ops.fused import convolve_silu, fused, gate_norm, rms_norm
from tests.model.shapes import SMALL, random_model


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients by the inputs of a weighted sum of the output, the weights always the same."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad((output * weights).sum(), inputs))


def leaves(*shapes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("batch", "length", "width", "taps"), [(1, 1, 5, 4), (2, 40, 33, 4), (3, 17, 64, 2)])
def test_the_convolution_and_its_gradients_are_those_of_tensor_operations(
    batch: int, length: int, width: int, taps: int
) -> None:
    window, weight, bias = inputs = leaves((batch, length + taps - 1, width), (width, taps), (width,))
    mixed = F.conv1d(window.transpose(1, 2), weight.unsqueeze(1), bias, groups=width)
    expected = F.silu(mixed.transpose(1, 2))
    parts = convolve_silu(window, weight, bias, 3)
    assert [part.shape[-1] for part in parts] == [3, width - 3]
    found = torch.cat(parts, -1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_the_gated_norm_and_its_gradients_are_those_of_tensor_operations(scale: float) -> None:
    y, x, z = rows = leaves((2, 9, 24), (2, 9, 24), (2, 9, 24), scale=scale)
    skip, weight = leaves((24,), (24,))
    inputs = [*rows, skip, weight]
    expected = F.rms_norm((y + skip * x) * F.silu(z), (24,), weight, 1e-5)
    found = gate_norm(y, x, z, skip, weight, 1e-5)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    for mine, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6 * max(1.0, float(other.abs().max())), rtol=2e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_the_norm_and_its_gradients_are_those_of_tensor_operations(scale: float) -> None:
    (x,), (weight,) = leaves((2, 9, 24), scale=scale), leaves((24,))
    found, expected = rms_norm(x, weight, 1e-5), F.rms_norm(x, (24,), weight, 1e-5)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    for mine, other in zip(gradients(found, [x, weight]), gradients(expected, [x, weight]), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6 * max(1.0, float(other.abs().max())), rtol=2e-5)


def test_views_of_a_larger_tensor_are_read_where_they_are() -> None:
    whole = torch.randn(2, 12, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight, bias = leaves((16, 4), (16,))
    part = whole[..., 8:24]
    found = gradients(torch.cat(convolve_silu(part, weight, bias, 10), -1), [whole])[0]
    expected = gradients(
        F.silu(F.conv1d(part.transpose(1, 2), weight.unsqueeze(1), bias, groups=16).transpose(1, 2)), [whole]
    )[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not found[..., :8].any()


def test_other_precisions_take_the_tensor_operations() -> None:
    values = torch.zeros(2)
    assert fused(values)
    assert not fused(values.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fused(values)


@pytest.mark.parametrize("lengths", [None, [40, 23]])
def test_a_block_and_its_gradients_are_those_of_tensor_operations(
    lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model().requires_grad_(True)
    block = model.trunk[0]
    hidden = torch.randn(2, 40, SMALL.d_trunk, generator=torch.Generator().manual_seed(2)).requires_grad_()
    stretch = torch.ones(2, 40) * 3.0
    counts = None if lengths is None else torch.tensor(lengths)
    results = []
    for quick in (True, False):
        monkeypatch.setattr(model_layers, "fused", lambda _, quick=quick: quick)
        output, after, _ = block(hidden, model.allocate_state(2).trunk[0], stretch, lengths=counts)
        used = {name: value for name, value in block.named_parameters() if "level_scale" not in name}
        found = gradients(output, [hidden, *used.values()])
        results.append([output, after.conv_state, after.ssm_state, *found])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5 * max(1.0, float(other.detach().abs().max())), rtol=1e-4)
