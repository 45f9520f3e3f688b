"""Information density: how many bits a byte would lose if the trunk were stale there.

Source: section 4.2 of the source document. Its four ideas (state gradient, attention entropy, temporal distance,
prediction) are read from the encoder's last block, causally, one value per position. A fifth is learned: what a small
network expects from the encoder's output and the other four.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.ops.features import Singles, density_rows
from model.ops.ssd import ScanTrace, StepTrace, into_chunks, segment_decay, ssd_scan
from model.ops.tiling import Floats, Integers, smooth_rows
from model.ops.views import Viewed
from model.state import DensityState

FEATURES = ("state_gradient", "attention_entropy", "temporal_distance", "predictive_entropy", "learned")
STANDARDISED = len(FEATURES) - 1
"""The first so many are standardised; the learned one has its unit already."""

_TINY = 1e-20
_TINIEST = 1e-30
_NO_WINDOW: tuple[Any, ...] = (*(np.empty((0, 0, 0), np.float32) for _ in range(3)), np.empty((0, 0), np.float32))
"""What stands for keys, weights, decays and mass where nothing is measured."""


class InformationDensityAnalyzer(Viewed[tuple[Any, ...]]):
    """Density in bits per byte: a non-negative combination of standardised features, and a learned one.

    Training fits it to the measured worth of the trunk; there the first four carry no gradient, for the trace has
    none. :meth:`forward` itself is differentiable, with finite gradients at any scale of its inputs.
    """

    mean: Tensor
    std: Tensor
    inner: Tensor
    inner_bias: Tensor
    outer: Tensor

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        """``width``: of what it reads, ``d_model`` by default."""
        super().__init__()
        width = config.d_model if width is None else width
        self.measured = config.density_measured
        self.window = config.density_window if config.density_measured else 0
        self.window_size = config.window_size
        self.chunk_size = config.chunk_size
        self.heads = config.heads(config.d_model)
        self.d_state = config.d_state
        self.norm_eps = config.norm_eps
        self.raw_weight = nn.Parameter(torch.full((STANDARDISED,), -1.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.register_buffer("mean", torch.zeros(STANDARDISED))
        self.register_buffer("std", torch.ones(STANDARDISED))
        units = config.density_hidden
        inner = torch.empty(units, width + STANDARDISED).normal_(std=width**-0.5)
        for name, value in (("inner", inner), ("inner_bias", torch.zeros(units)), ("outer", torch.zeros(units))):
            if units:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)

    def zero_state(self, batch: int, device: torch.device) -> DensityState:
        """The state of ``batch`` sequences of which nothing was analysed."""
        return DensityState(
            keys=torch.zeros(batch, self.window, self.d_state, device=device),
            weights=torch.zeros(batch, self.window, self.heads, device=device),
            log_decay=torch.zeros(batch, self.window, self.heads, device=device),
            mass=torch.zeros(batch, self.heads, device=device),
            seen=torch.zeros(batch, dtype=torch.int64, device=device),
            level=torch.zeros(batch, dtype=torch.float64, device=device),
        )

    def combine(self, features: Tensor) -> Tensor:
        """Density [...] in bits, above 0, from features [..., 5]. Differentiable in the weights."""
        standard = self._standard(features[..., :STANDARDISED])
        total = (standard * F.softplus(self.raw_weight)).sum(-1) + self.bias + features[..., STANDARDISED]
        return F.softplus(total) + 1e-6

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    def learned(self, features: Tensor, hidden: Tensor) -> Tensor:
        """``features`` [..., 4] with the learned one behind them [..., 5], from encoder outputs [..., d_model].

        A later stage of the trunk gives what it reads instead, of the trunk's width.
        """
        normal = F.rms_norm(hidden, hidden.shape[-1:], eps=self.norm_eps)
        inner = F.linear(torch.cat([normal, self._standard(features)], -1), self.inner, self.inner_bias)
        learned = (F.silu(inner) * self.outer).sum(-1, keepdim=True)
        return torch.cat([features, learned], -1)

    @torch.no_grad()
    def smooth(self, density: Tensor, before: DensityState, after: DensityState) -> Floats:
        """The density [B, L] (float64, on the CPU) that decides where the trunk runs: averaged over ``window_size``.

        An exponential average, a plain mean until the window is full. Smoothed, the trunk runs in stretches and not at
        single bytes: it reads its neighbours through convolutions, and after a gap it is worth little for some bytes.

        Args:
            density: [B, L] bits. before, after: the analyzer's state around these positions; ``after`` gets the level.
        """
        levels = before.level.cpu().numpy().copy()
        values = np.ascontiguousarray(density.double().cpu().numpy())
        smoothed = smooth_rows(values, levels, before.seen.cpu().numpy(), self.window_size)
        after.level.copy_(torch.from_numpy(levels))
        return smoothed

    @torch.no_grad()
    def smooth_step(self, density: Tensor, state: DensityState) -> Tensor:
        """The same at one position [B] (float64), its density state advanced in place; ``seen`` counts it already."""
        state.level += (density.double() - state.level) / state.seen.clamp_max(self.window_size)
        return state.level

    @torch.no_grad()
    def update_statistics(self, features: Tensor, momentum: float) -> None:
        """Move the running mean and deviation towards those of ``features`` [..., 5] by ``momentum``."""
        flat = features[..., :STANDARDISED].reshape(-1, STANDARDISED)
        self.mean.lerp_(flat.mean(0), momentum)
        self.std.lerp_(flat.std(0).clamp_min(1e-3), momentum)

    def forward(
        self, hidden: Tensor, exit_logits: Tensor | None, trace: ScanTrace | None, state: DensityState
    ) -> tuple[Tensor, DensityState]:
        """Features of L positions.

        Args:
            hidden: [B, L, d_model] encoder outputs. exit_logits: [B, L, V] of the early-exit head.
            trace: of the encoder's last block; neither is read where nothing is measured.
            state: before them, not changed.

        Returns:
            features [B, L, 5] in the order of ``FEATURES``, and the state after.
        """
        if not self.measured:
            return self._unmeasured(hidden, state, hidden.shape[1])
        assert exit_logits is not None
        assert trace is not None
        entropy, distance, after = self._attention(trace, state)
        if trace.change is None:
            gradient = state_gradient(trace, self.chunk_size)
        else:
            gradient = trace.change.sqrt().log1p().to(entropy.dtype)
        features = torch.stack([gradient, entropy, distance, predictive_entropy(exit_logits)], dim=-1)
        return self.learned(features, hidden), after

    @torch.no_grad()
    def step(
        self, hidden: Tensor, exit_logits: Tensor | None, trace: StepTrace, state: DensityState
    ) -> tuple[Tensor, DensityState]:
        """Features [B, 5] of one position; ``hidden`` [B, d_model], otherwise as :meth:`forward`."""
        if not self.measured:
            return self._unmeasured(hidden, state, 1)
        assert exit_logits is not None
        keys = torch.cat([state.keys[:, 1:], trace.B.unsqueeze(1)], dim=1)
        weights = torch.cat([state.weights[:, 1:], trace.dt.unsqueeze(1)], dim=1)
        log_decay = torch.cat([state.log_decay[:, 1:], trace.log_decay.unsqueeze(1)], dim=1)
        norms = keys.norm(dim=-1, keepdim=True)
        mass = state.mass * trace.log_decay.exp() + trace.dt * norms[:, -1]
        after = DensityState(keys, weights, log_decay, mass, state.seen + 1, state.level.clone())
        decay_sum = log_decay.flip(1).cumsum(1).flip(1) - log_decay  # from key j to now: positions after j
        decayed = weights * decay_sum.exp()  # [B, W, H]
        query = trace.C
        # Not a matrix product: a sum over the last axis gives a row the same bits whatever rows stand beside it.
        scores = (query.unsqueeze(1) * keys).sum(-1).abs().unsqueeze(-1) * decayed
        past = (mass - (decayed * norms).sum(1)).clamp_min(0.0) * query.norm(dim=-1, keepdim=True)
        entropy, distance = self._summarise(scores, past, after.seen)
        gradient = trace.change.sqrt().log1p().to(entropy.dtype)
        features = torch.stack([gradient, entropy, distance, predictive_entropy(exit_logits)], dim=-1)
        return self.learned(features, hidden), after

    def _unmeasured(self, hidden: Tensor, state: DensityState, count: int) -> tuple[Tensor, DensityState]:
        """Features whose first four are 0, and the state ``count`` positions later."""
        features = self.learned(hidden.new_zeros(*hidden.shape[:-1], STANDARDISED), hidden)
        return features, replace(state, seen=state.seen + count, level=state.level.clone())

    def step_rows(
        self, hidden: Singles, exit_logits: Singles, trace: tuple[Any, ...], state: DensityState, rows: Integers
    ) -> Floats:
        """Smoothed density [n] of one position for the rows ``rows`` [n] of a batch on a CPU; the compiled fast path.

        Args:
            hidden: [n, d_model] and exit_logits: [n, V], of those rows. trace: of the whole batch, as arrays; neither
                is read where nothing is measured.
            state: of the whole batch, its ``rows`` advanced in place.
        """
        window = _NO_WINDOW
        if self.measured:
            window = tuple(one.numpy() for one in (state.keys, state.weights, state.log_decay, state.mass))
        arrays = (*trace, *window, state.seen.numpy(), state.level.numpy(), *self.views())
        density: Floats = density_rows(*[rows, hidden, exit_logits, *arrays, self.norm_eps, self.window_size])
        return density

    def _make_views(self) -> tuple[Any, ...]:
        tensors = (self.mean, self.std, self.raw_weight, self.bias, self.inner, self.inner_bias, self.outer)
        return tuple(value.detach().numpy() for value in tensors)

    def _attention(self, trace: ScanTrace, state: DensityState) -> tuple[Tensor, Tensor, DensityState]:
        """Entropy and look-back distance [B, L] of the hidden attention over the window plus one lump."""
        length = trace.C.shape[1]
        keys = torch.cat([state.keys, trace.B], dim=1)  # [B, W + L, N]
        weights = torch.cat([state.weights, trace.dt], dim=1)
        log_decay = torch.cat([state.log_decay, trace.dt * trace.A], dim=1)
        norms = keys.norm(dim=-1, keepdim=True)  # [B, W + L, 1]
        ones = torch.ones_like(norms[:, self.window :])
        total_mass = ssd_scan(
            norms[:, self.window :, None].expand(-1, -1, self.heads, -1), trace.dt, trace.A, ones, ones,
            initial_state=state.mass[..., None, None], chunk_size=self.chunk_size,
        )  # fmt: skip
        query = into_chunks(trace.C, self.chunk_size)  # [B, c, Q, N]
        scores = _band(query @ self._overlap(keys), self.window).abs().unsqueeze(-1)  # [B, L', W, 1]
        sums = torch.cumsum(self._overlap(log_decay), dim=-1)  # [B, c, H, Q + W]
        here = sums[..., self.window :].unsqueeze(-1)
        exponent = _band((here - sums.unsqueeze(-2)).flatten(1, 2), self.window)
        exponent = exponent.unflatten(1, (sums.shape[1], self.heads, self.chunk_size))
        reach = _band_vector(self._overlap(weights), self.window) * exponent.clamp_max(0.0).exp()
        decayed = reach.permute(0, 1, 3, 4, 2).flatten(1, 2)[:, :length]  # [B, L, W, H]
        lengths = _band_vector(self._overlap(norms), self.window)[:, :, 0].flatten(1, 2)[:, :length]
        mass = total_mass.y[..., 0]  # [B, L, H]
        past = (mass - (decayed * lengths.unsqueeze(-1)).sum(2)).clamp_min(0.0)
        past = past * trace.C.norm(dim=-1, keepdim=True)
        seen = state.seen.unsqueeze(1) + torch.arange(1, length + 1, device=keys.device)
        entropy, distance = self._summarise(scores[:, :length] * decayed, past, seen)
        last = slice(keys.shape[1] - self.window, None)
        after = DensityState(
            keys[:, last],
            weights[:, last],
            log_decay[:, last],
            total_mass.final_state[..., 0, 0],
            seen[:, -1],
            state.level.clone(),
        )
        return entropy, distance, after

    def _overlap(self, value: Tensor) -> Tensor:
        """[B, W + L, X] -> [B, c, X, W + Q]: each chunk with the W positions before it."""
        missing = -(value.shape[1] - self.window) % self.chunk_size
        return F.pad(value, (0, 0, 0, missing)).unfold(1, self.window + self.chunk_size, self.chunk_size)

    def _summarise(self, scores: Tensor, past: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over heads of entropy (share of its maximum) and of the look-back distance (share of the window).

        Args:
            scores: [..., W, H] oldest first. past: [..., H]. seen: [...] positions analysed, this one included.
        """
        total = scores.sum(-2) + past + _TINY
        share = scores / total.unsqueeze(-2)
        lump = past / total
        plogp = _entropy_term(share).sum(-2) + _entropy_term(lump)
        row = seen.clamp(max=self.window).to(total.dtype) + 1.0
        entropy = plogp.mean(-1) / row.log()
        ages = torch.arange(self.window - 1, -1, -1, device=scores.device, dtype=scores.dtype)
        distance = (share * ages.unsqueeze(-1)).sum(-2) + lump * self.window
        return entropy, distance.mean(-1) / self.window


def _band(matrix: Tensor, window: int) -> Tensor:
    """The band of [B, G, Q, W + Q] that row i shares with columns i + 1 .. i + W: [B, G * Q, W]."""
    matrix = matrix.contiguous()
    rows, columns = matrix.shape[-2:]
    strides = (*matrix.stride()[:-2], columns + 1, 1)
    view = matrix.as_strided((*matrix.shape[:-2], rows, window), strides, matrix.storage_offset() + 1)
    return view.flatten(1, 2)


def _band_vector(value: Tensor, window: int) -> Tensor:
    """The windows of [B, c, X, W + Q] that end at each of the last Q columns: [B, c, X, Q, W]."""
    return value[..., 1:].unfold(-1, window, 1)


def _entropy_term(share: Tensor) -> Tensor:
    """-p log p; at 0, where its slope has no bound, without gradient."""
    term: Tensor = torch.special.entr(share.clamp_min(_TINIEST))
    return term


def _magnitude(square: Tensor) -> Tensor:
    """The square root of sums of squares, whose rounding may leave them at or under 0: there 0, without gradient."""
    positive = square > 0.0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _power_of_two(value: Tensor) -> Tensor:
    """The power of two at the largest magnitude of each sequence of ``value`` [B, ...], as [B]; 0 where all is 0."""
    peak = value.detach().abs().flatten(1).amax(1)
    mantissa, _ = torch.frexp(peak)
    return torch.where(peak > 0.0, peak / mantissa, 0.0)


def smooth_density(density: Tensor, window_size: int = 32) -> Tensor:
    """Mean density [B, L] of the last ``window_size`` bytes at each byte, of fewer where fewer were read.

    Causal, and as long as its input. It tells how dense a passage is, for resolution by region. Where tiles end is
    decided on an exponential average, :meth:`InformationDensityAnalyzer.smooth`, which needs one number of state.

    Source: ``window_size``, section 4.2.1 of the source document, whose centred window sees the future.

    Raises:
        ValueError: ``window_size`` is under 1.
    """
    if window_size < 1:
        raise ValueError(f"window_size = {window_size} must be at least 1")
    length = density.shape[1]
    # In float64: a difference of running sums keeps the error of the whole text at every byte.
    total = F.pad(density.double().cumsum(1), (1, 0))
    end = torch.arange(1, length + 1, device=density.device)
    start = (end - window_size).clamp_min(0)
    return ((total[:, end] - total[:, start]) / (end - start)).to(density.dtype)


def state_gradient(trace: ScanTrace, chunk_size: int) -> Tensor:
    """log(1 + ||h_t - h_{t-1}||) over all heads [B, L], without materialising the states.

    With a = exp(dt A): ``||dh||^2 = (a-1)^2 ||h||^2 + 2 (a-1) dt x^T h B + dt^2 ||x||^2 ||B||^2``, h = h_{t-1}. The
    cross term is a read of the state with query B, ``||h||^2`` a scalar recurrence. Where a state hardly changes these
    terms cancel: the error of ``||dh||`` is up to the square root of the type's precision times ``||h||``.

    Everything is computed at a scale of 1 and scaled back, so that squares (and gradients) neither vanish nor overflow;
    by powers of two, which change no bit otherwise.
    """
    length = trace.x.shape[1]
    x_scale = _power_of_two(trace.x)
    scale = torch.maximum(x_scale * _power_of_two(trace.B), _power_of_two(trace.before))
    x_scale, scale = (torch.where(value > 0.0, value, 1.0) for value in (x_scale, scale))
    x = into_chunks(trace.x / x_scale[:, None, None, None], chunk_size).transpose(2, 3)  # [B, c, H, Q, P]
    B = into_chunks(trace.B * (x_scale / scale)[:, None, None], chunk_size)  # [B, c, Q, N]
    before = trace.before / scale[:, None, None, None, None]  # [B, c, H, P, N]
    dt = into_chunks(trace.dt, chunk_size).transpose(2, 3)  # [B, c, H, Q]
    log_decay = dt * trace.A[:, None]
    grams = (B @ B.transpose(-1, -2)).unsqueeze(2) * (x @ x.transpose(-1, -2))  # [B, c, H, Q, Q]
    decay = segment_decay(log_decay, strict=True)  # [B, c, H, Q, Q]
    cross = (grams * decay) @ dt.unsqueeze(-1)
    start = log_decay.cumsum(-1) - log_decay  # from the chunk's start to before each position
    read = (before @ B.transpose(-1, -2).unsqueeze(2)).transpose(-1, -2)  # [B, c, H, Q, P]
    cross_term = cross.squeeze(-1) + (read * x).sum(-1) * start.exp()  # x^T h_{t-1} B
    added = dt.square() * torch.diagonal(grams, dim1=-2, dim2=-1)
    gain = log_decay.exp()
    change = 2.0 * gain * dt * cross_term + added  # ||h_t||^2 = gain^2 ||h_{t-1}||^2 + change
    norm = (decay.square() @ change.unsqueeze(-1)).squeeze(-1)
    norm = norm + before.square().sum((-1, -2)).unsqueeze(-1) * (2.0 * start).exp()
    shrink = torch.expm1(log_decay)  # a - 1
    square = shrink.square() * norm + 2.0 * shrink * dt * cross_term + added
    magnitude = _magnitude(square.clamp_min(0.0).sum(2).flatten(1)[:, :length])
    return (magnitude * scale.unsqueeze(1)).log1p()


def predictive_entropy(logits: Tensor) -> Tensor:
    """Entropy in bits [...] of the distribution that ``logits`` [..., V] describe."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(2.0)
