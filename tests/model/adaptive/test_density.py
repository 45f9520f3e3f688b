"""The four features against plain references, which materialise what the analyzer avoids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.references import H, L, N, P, autograd_gradient, dense_rows, make_trace, states
from model.adaptive.density import InformationDensityAnalyzer, predictive_entropy, smooth_density, state_gradient
from model.ops.ssd import ScanTrace, ssd_scan
from tests.model.shapes import SMALL, encode_one, random_model, random_tokens


def test_the_state_gradient_is_the_norm_of_the_states_difference() -> None:
    trace = make_trace()
    difference = states(trace).diff(dim=1).flatten(2).norm(dim=-1)
    torch.testing.assert_close(state_gradient(trace, 8), difference.log1p(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4])
def test_the_state_gradient_is_exact_at_every_scale(scale: float) -> None:
    """In fp32 the plain formula's squares vanish at 1e-8 ** 6; the value must not."""
    trace = make_trace()
    x, dt, B = trace.x * scale, trace.dt * min(scale, 1.0), trace.B * scale
    zero = torch.zeros(2, H, P, N, dtype=torch.float64)
    scan = ssd_scan(x, dt, trace.A, B, B, initial_state=zero, chunk_size=8)
    exact = ScanTrace(x, dt, trace.A, B, B, scan.chunk_states)
    expected = states(exact).diff(dim=1).flatten(2).norm(dim=-1).log1p()
    single = ScanTrace(*(getattr(exact, name).float() for name in ScanTrace.__slots__[:-1]))
    torch.testing.assert_close(state_gradient(single, 8).double(), expected, atol=0, rtol=1e-3)


def test_the_state_gradient_is_autograds_through_a_continuous_position() -> None:
    trace = make_trace()
    torch.testing.assert_close(state_gradient(trace, 8), autograd_gradient(trace).log1p(), atol=1e-9, rtol=1e-9)


def test_the_state_gradient_of_a_state_at_rest_is_zero_up_to_cancellation() -> None:
    ones = torch.ones(1, 400, dtype=torch.float64)
    x, B = ones[..., None, None].expand(-1, -1, H, P), ones[..., None].expand(-1, -1, N)
    dt, A = ones[..., None].expand(-1, -1, H) * 0.5, -torch.ones(H, dtype=torch.float64)
    scan = ssd_scan(x, dt, A, B, B, initial_state=torch.zeros(1, H, P, N, dtype=torch.float64), chunk_size=8)
    found = state_gradient(ScanTrace(x, dt, A, B, B, scan.chunk_states), 8)
    assert found[0, 0] > 1.0
    assert found[0, 200:].max() < 10 * math.sqrt(torch.finfo(torch.float64).eps) * scan.final_state.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_entropy_and_distance_equal_a_dense_attention_row(dtype: torch.dtype, tolerance: float) -> None:
    model, tokens, window = random_model().to(dtype), random_tokens(1, 70), SMALL.density_window
    with torch.no_grad():
        state = model.allocate_state(1).map(lambda value: value.to(dtype) if value.is_floating_point() else value)
        encoded = model.encode(tokens, state.encoder)
        features, _ = model.features(encoded, state.density)
    for t in (0, 1, 5, window - 1, window, 40, 69):
        entropy, distance = dense_rows(encoded.trace, t, window)
        torch.testing.assert_close(features[0, t, 1], entropy, atol=tolerance, rtol=0)
        torch.testing.assert_close(features[0, t, 2], distance, atol=tolerance, rtol=0)


@pytest.mark.parametrize("bits", [0, 1, 3, 8])
def test_predictive_entropy_is_in_bits(bits: int) -> None:
    logits = torch.full((256,), -1e4)
    logits[: 2**bits] = 5.0
    assert predictive_entropy(logits).item() == pytest.approx(bits, abs=1e-4)


def analysed(trace: ScanTrace, logits: torch.Tensor, pieces: tuple[int, ...]) -> torch.Tensor:
    """Features of a trace, whose x is also the output, that a new analyzer is given in pieces of these lengths."""
    config = SMALL.model_copy(update={"chunk_size": 8, "d_state": N, "d_model": H * P, "expand": 1, "headdim": P})
    torch.manual_seed(1)
    analyzer = InformationDensityAnalyzer(config).to(logits.dtype)
    nn.init.normal_(analyzer.outer)
    state = analyzer.zero_state(len(logits), logits.device)
    state = state.map(lambda value: value.to(logits.dtype) if value.is_floating_point() else value)
    parts, start = [], 0
    for size in pieces:
        here = slice(start, start + size)
        chunks = trace.before[:, start // 8 : -(-(start + size) // 8)]
        part = ScanTrace(trace.x[:, here], trace.dt[:, here], trace.A, trace.B[:, here], trace.C[:, here], chunks)
        features, state = analyzer(part.x.flatten(2), logits[:, here], part, state)
        parts.append(features)
        start += size
    return torch.cat(parts, 1)


def test_features_do_not_depend_on_pieces_or_batch_mates() -> None:
    trace, logits = make_trace(), torch.randn(2, L, 257, dtype=torch.float64)
    whole = analysed(trace, logits, (L,))
    torch.testing.assert_close(analysed(trace, logits, (8, 16, 8, 13)), whole, atol=1e-9, rtol=1e-9)
    for row in range(2):
        alone = ScanTrace(*(value if value is trace.A else value[row : row + 1] for value in (
            trace.x, trace.dt, trace.A, trace.B, trace.C, trace.before)))  # fmt: skip
        torch.testing.assert_close(analysed(alone, logits[row : row + 1], (L,))[0], whole[row], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("scaled", ["x", "dt", "B", "C", "all"])
def test_gradients_through_the_density_are_finite_at_every_scale(scaled: str, scale: float, dtype: torch.dtype) -> None:
    trace = make_trace(torch.float64)
    inputs = {
        name: (getattr(trace, name) * (scale if scaled in (name, "all") else 1.0)).to(dtype).requires_grad_()
        for name in ("x", "dt", "B", "C")
    }
    A, zero = trace.A.to(dtype), torch.zeros(2, H, P, N, dtype=dtype)
    logits = (torch.randn(2, L, 257, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    x, dt, B, C = inputs.values()
    scan = ssd_scan(x, dt, A, B, C, initial_state=zero, chunk_size=8)
    whole = ScanTrace(x, dt, A, B, C, scan.chunk_states)
    features = analysed(whole, logits, (L,))
    density = random_model().to(dtype).density.requires_grad_()
    density.combine(features).sum().backward()
    gradients = [*(value.grad for value in inputs.values()), logits.grad, density.raw_weight.grad, density.bias.grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    if scale:
        assert inputs["x"].grad.any()


def test_the_work_is_linear_in_the_length() -> None:
    def work(length: int) -> int:
        model, tokens = random_model(), random_tokens(1, length)
        state = model.allocate_state(1)
        with torch.no_grad():
            encoded = model.encode(tokens, state.encoder)
            logits = model.exit_head(encoded.hidden)
            with FlopCounterMode(display=False) as counter:
                model.density(encoded.hidden, logits, encoded.trace, state.density)
        return counter.get_total_flops()

    assert work(256) > 0
    assert work(1024) == 4 * work(256)


@pytest.mark.parametrize("window_size", [1, 2, 31, 32, 100])
def test_smoothing_is_a_causal_mean_of_the_same_length(window_size: int) -> None:
    density = torch.rand(3, 60, dtype=torch.float64) * torch.logspace(-6, 2, 60, dtype=torch.float64)
    smooth = smooth_density(density, window_size)
    expected = torch.stack([density[:, max(0, t + 1 - window_size) : t + 1].mean(1) for t in range(60)], 1)
    torch.testing.assert_close(smooth, expected, atol=1e-12, rtol=1e-9)
    changed = density.clone()
    changed[:, 40:] += 5.0
    assert torch.equal(smooth_density(changed, window_size)[:, :40], smooth[:, :40])
    assert (smooth_density(changed, window_size)[:, 40] > smooth[:, 40]).all()


def test_a_window_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="window_size = 0 must be at least 1"):
        smooth_density(torch.ones(1, 4), 0)


def test_features_of_steps_equal_those_of_a_pass() -> None:
    model, tokens = random_model(), random_tokens(2, 50)
    state, rows = model.allocate_state(2), []
    with torch.no_grad():
        encoded = model.encode(tokens, state.encoder)
        whole, _ = model.features(encoded, state.density)
        for column in tokens.unbind(1):
            hidden, trace = encode_one(model, column, state)
            features, state.density = model.density.step(hidden, model.exit_head(hidden), trace, state.density)
            rows.append(features)
    torch.testing.assert_close(torch.stack(rows, 1), whole, atol=1e-4, rtol=1e-4)


def test_density_is_positive_and_rises_with_every_feature() -> None:
    density = random_model().density
    features = torch.randn(100, 5)
    base = density.combine(features)
    assert (base > 0).all()
    for index in range(5):
        more = features.clone()
        more[:, index] += 1.0
        assert (density.combine(more) >= base).all()


@pytest.mark.parametrize("pieces", [(60,), (1,) * 60, (7, 33, 20)])
def test_the_smoothed_density_is_a_mean_that_turns_into_an_exponential_average(pieces: tuple[int, ...]) -> None:
    analyzer = InformationDensityAnalyzer(SMALL.model_copy(update={"window_size": 8}))
    density = torch.rand(3, 60, dtype=torch.float64)
    state, parts = analyzer.zero_state(3, density.device), []
    for piece in density.split(pieces, dim=1):
        after = state.map(torch.clone)
        after.seen += piece.shape[1]
        parts.append(analyzer.smooth(piece, state, after))
        state = after
    level, expected = torch.zeros(3, dtype=torch.float64), []
    for t in range(60):
        level = level + (density[:, t] - level) / min(t + 1, 8)
        expected.append(level)
    smoothed = torch.from_numpy(np.concatenate(parts, 1))
    torch.testing.assert_close(smoothed, torch.stack(expected, 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(smoothed[:, :8], density[:, :8].cumsum(1) / torch.arange(1, 9), atol=1e-12, rtol=0)
    assert torch.equal(state.level, smoothed[:, -1])
