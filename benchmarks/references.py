"""Plain references that the tests and :mod:`benchmarks.parity` hold the components against: what they avoid, done."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import numpy as np
import torch

from model.ops.ssd import ScanTrace, ssd_scan, ssd_step
from model.ops.tiling import Bytes, Floats, tiling_loss

H, P, N, L = 3, 4, 6, 45


def make_trace(dtype: torch.dtype = torch.float64) -> ScanTrace:
    """Two random sequences in chunks of 8."""
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


def autograd_gradient(trace: ScanTrace) -> torch.Tensor:
    """Norm of the state's derivative by a continuous position [B, L], by automatic differentiation.

    Byte t is read gradually while the position p runs from t to t + 1; the state is then a function of p. Its
    derivative in the middle of byte t, one component at a time (a sum would let signs cancel), is what is measured.
    """
    decay = (trace.dt * trace.A).exp()[..., None, None]
    added = (trace.x * trace.dt.unsqueeze(-1)).unsqueeze(-1) * trace.B[:, :, None, None, :]
    expected = torch.empty(2, L, dtype=torch.float64)
    for byte in range(L):
        position = torch.full((2, 1, 1, 1), byte + 0.5, dtype=torch.float64, requires_grad=True)
        state = trace.before[:, 0]
        for t in range(L):
            read = (position - t).clamp(0.0, 1.0)
            state = state + read * ((decay[:, t] - 1.0) * state + added[:, t])
        components = state.flatten(1).sum(0)  # each position moves its own sequence alone
        basis = torch.eye(len(components), dtype=torch.float64)
        (rows,) = torch.autograd.grad(components, position, basis, is_grads_batched=True)
        expected[:, byte] = rows.flatten(1).norm(dim=0)
    return expected


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


def restarts(fires: Bytes, carry: int) -> int:
    """Tiles of more than one byte."""
    fired_before = np.concatenate([[carry == 0], fires[:-1]])
    return int(((fires == 1) & (fired_before == 0)).sum())


def cost_of(fires: Bytes, density: Floats, table: Floats, price: float, entry: float, carry: int) -> float:
    """Bits lost and paid under given fires; arguments as of :func:`model.ops.tiling.plan_block`."""
    return float(tiling_loss(fires, density, table, carry)) + price * int(fires.sum()) + entry * restarts(fires, carry)


def brute_force(
    density: Floats, table: Floats, price: float, entry: float, carry: int, sizes: Collection[int]
) -> float:
    """The least cost over every set of fires whose tiles have one of ``sizes``, but for an open last one."""
    most = max(sizes)
    best = math.inf
    for fires in itertools.product((0, 1), repeat=len(density)):
        size, allowed, first = carry, True, True
        for fire in fires:
            size += 1
            # A tile that the carry already made too long must end at its next byte.
            limit = max(most, carry + 1) if first else most
            allowed &= size <= limit and ((size in sizes or size > most) if fire else size < limit)
            if fire:
                size, first = 0, False
        if allowed:
            best = min(best, cost_of(np.array(fires, np.uint8), density, table, price, entry, carry))
    return best
