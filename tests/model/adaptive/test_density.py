"""The four features against plain references, which materialise what the analyzer avoids."""

from __future__ import annotations

import math

import pytest
import torch

from model.adaptive.density import predictive_entropy, state_gradient
from model.ops.ssd import ScanTrace, ssd_scan, ssd_step
from tests.model.shapes import SMALL, encode_one, random_model, random_tokens

H, P, N, L = 3, 4, 6, 45


def make_trace(dtype: torch.dtype = torch.float64) -> ScanTrace:
    torch.manual_seed(0)
    x, B, C = (torch.randn(2, L, *shape, dtype=dtype) for shape in ((H, P), (N,), (N,)))
    dt, A = torch.rand(2, L, H, dtype=dtype), -torch.rand(H, dtype=dtype)
    scan = ssd_scan(x, dt, A, B, C, initial_state=torch.randn(2, H, P, N, dtype=dtype), chunk_size=8)
    return ScanTrace(x, dt, A, B, C, scan.chunk_states)


def states(trace: ScanTrace) -> torch.Tensor:
    """Every state [B, L + 1, H, P, N], the initial one first."""
    all_states = [trace.before[:, 0]]
    for t in range(L):
        all_states.append(
            ssd_step(trace.x[:, t], trace.dt[:, t], trace.A, trace.B[:, t], trace.C[:, t], all_states[-1])[1]
        )
    return torch.stack(all_states, 1)


def test_the_state_gradient_is_the_norm_of_the_states_difference() -> None:
    trace = make_trace()
    difference = states(trace).diff(dim=1).flatten(2).norm(dim=-1)
    torch.testing.assert_close(state_gradient(trace, 8), difference.log1p(), atol=1e-9, rtol=1e-9)


def test_the_state_gradient_is_autograds_through_a_continuous_position() -> None:
    """h(s) = h_t-1 + s (h_t - h_t-1) runs from one position to the next; its derivative by s is what is measured."""
    trace = make_trace()
    before, after = states(trace)[:, :-1], states(trace)[:, 1:]
    s = torch.zeros((), dtype=torch.float64)
    _, derivative = torch.autograd.functional.jvp(lambda s: before + s * (after - before), s, torch.ones_like(s))
    expected = derivative.flatten(2).norm(dim=-1).log1p()
    torch.testing.assert_close(state_gradient(trace, 8), expected, atol=1e-9, rtol=1e-9)


def dense_rows(trace: ScanTrace, t: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and distance at t of the first sequence: its whole attention row, keys that left the window lumped."""
    total = (trace.dt * trace.A)[0].cumsum(0)
    decay = (total[t] - total[: t + 1]).exp() * trace.dt[0, : t + 1]  # [t + 1, H]
    query, keys = trace.C[0, t], trace.B[0, : t + 1]
    near = slice(max(0, t + 1 - window), t + 1)
    scores = (keys[near] @ query).abs().unsqueeze(-1) * decay[near]
    # Of older keys the analyzer knows |query| |key| alone.
    past = (decay * keys.norm(dim=-1, keepdim=True))[: near.start].sum(0) * query.norm()
    row = torch.cat([past.unsqueeze(0), scores]) / (scores.sum(0) + past)
    entropy = torch.special.entr(row).sum(0).mean() / math.log(min(t + 1, window) + 1)
    ages = torch.tensor([window, *range(len(scores) - 1, -1, -1)], dtype=row.dtype)
    return entropy, (row * ages.unsqueeze(-1)).sum(0).mean() / window


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-4)])
def test_entropy_and_distance_equal_a_dense_attention_row(dtype: torch.dtype, tolerance: float) -> None:
    model, tokens, window = random_model().to(dtype), random_tokens(1, 70), SMALL.density_window
    with torch.no_grad():
        state = model.allocate_state(1).map(lambda value: value.to(dtype) if value.is_floating_point() else value)
        encoded = model.encode(tokens, state.encoder)
        features, _ = model.density(model.exit_head(encoded.hidden), encoded.trace, state.density)
    for t in (0, 1, 5, window - 1, window, 40, 69):
        entropy, distance = dense_rows(encoded.trace, t, window)
        torch.testing.assert_close(features[0, t, 1], entropy, atol=tolerance, rtol=0)
        torch.testing.assert_close(features[0, t, 2], distance, atol=tolerance, rtol=0)


@pytest.mark.parametrize("bits", [0, 1, 3, 8])
def test_predictive_entropy_is_in_bits(bits: int) -> None:
    logits = torch.full((256,), -1e4)
    logits[: 2**bits] = 5.0
    assert predictive_entropy(logits).item() == pytest.approx(bits, abs=1e-4)


def test_features_of_steps_equal_those_of_a_pass() -> None:
    model, tokens = random_model(), random_tokens(2, 50)
    state, rows = model.allocate_state(2), []
    with torch.no_grad():
        encoded = model.encode(tokens, state.encoder)
        whole, _ = model.density(model.exit_head(encoded.hidden), encoded.trace, state.density)
        for column in tokens.unbind(1):
            hidden, trace = encode_one(model, column, state)
            features, state.density = model.density.step(model.exit_head(hidden), trace, state.density)
            rows.append(features)
    torch.testing.assert_close(torch.stack(rows, 1), whole, atol=1e-4, rtol=1e-4)


def test_density_is_positive_and_rises_with_every_feature() -> None:
    density = random_model().density
    features = torch.randn(100, 4)
    base = density.combine(features)
    assert (base > 0).all()
    for index in range(4):
        more = features.clone()
        more[:, index] += 1.0
        assert (density.combine(more) >= base).all()
