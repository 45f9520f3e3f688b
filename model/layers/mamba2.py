"""The Mamba-2 block, with a state size that can change at run time.

Source: Dao and Gu 2024, section 7 (the block) and the public Mamba-2 checkpoints' conventions for parameter names.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.compiled import BlockViews, read_stack
from model.layers.norm import RMSNorm
from model.layers.propagation import Propagated
from model.ops.fused import convolve_silu, fused, gate_norm
from model.ops.fused_scan import fused_scan
from model.ops.recurrent import compiled
from model.ops.ssd import ScanTrace, StepTrace, ssd_scan, ssd_step
from model.ops.views import Viewed
from model.ops.words import readable
from model.state import BlockState, zero_block_state


class VariableStateSpaceModel(nn.Module):
    """The Mamba-2 mixer with nested state sizes: a state of n columns is the first n columns of the full one.

    Args:
        width: model width D.
        config: shape; ``d_state_levels`` matter only if ``variable``.
        variable: whether the state size may change, and a step may stand for several bytes (the trunk).
    """

    level_sizes: Tensor
    level_scale: Tensor
    tile_exponent: Tensor

    def __init__(self, width: int, config: ModelConfig, *, variable: bool) -> None:
        super().__init__()
        self.width = width
        self._config, self._variable = config, variable
        self.d_inner = config.inner(width)
        self.heads = config.heads(width)
        self.headdim = config.headdim
        self.d_state = config.d_state
        self.chunk_size = config.chunk_size
        self.levels = config.d_state_levels if variable else (config.d_state,)
        self.conv_dim = self.d_inner + 2 * self.d_state
        self.in_proj = nn.Linear(width, self.d_inner + self.conv_dim + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_dim, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(self.conv_dim))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.d_inner, config.norm_eps)
        self.out_proj = nn.Linear(self.d_inner, width, bias=False)
        rank = config.propagation_rank if variable else 0
        self.propagation = nn.Linear(rank, self.conv_dim + self.heads, bias=False) if rank else None
        """Of a byte's code, what the convolution and the state read of it where the block is not run."""
        self.register_buffer("level_sizes", torch.tensor(self.levels), persistent=False)
        self.least_dt, most_dt = config.dt_limits
        self.most_dt = math.inf if most_dt is None else most_dt
        if variable:
            self.tile_exponent = nn.Parameter(torch.zeros(self.heads))
            self.level_scale = nn.Parameter(torch.ones(len(self.levels) - 1))
        else:
            self.register_buffer("tile_exponent", torch.zeros(self.heads), persistent=False)
            self.register_buffer("level_scale", torch.ones(0), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values of Mamba-2: A in [1, 16], dt log-uniform in [1e-3, 1e-1]."""
        nn.init.normal_(self.in_proj.weight, std=0.02)
        nn.init.normal_(self.out_proj.weight, std=0.02)
        if self.propagation is not None:
            nn.init.zeros_(self.propagation.weight)
        bound = 1.0 / math.sqrt(self.conv_weight.shape[1])
        nn.init.uniform_(self.conv_weight, -bound, bound)
        with torch.no_grad():
            self.A_log.uniform_(1.0, 16.0).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def zero_state(self, batch: int, device: torch.device) -> BlockState:
        """The state of ``batch`` sequences that have read nothing."""
        d_conv = self.conv_weight.shape[1]
        return zero_block_state(batch, self.conv_dim, d_conv, self.heads, self.headdim, self.d_state, device)

    def resize_state_space(
        self, state: BlockState, d_state: int, interpolation_mode: Literal["nested", "linear"] = "nested"
    ) -> BlockState:
        """A copy of a live state at another size: fewer columns are a prefix, more are filled with zeros.

        ``interpolation_mode="linear"`` resamples the state axis instead, as the source document does. Columns of a
        state have no order, so this destroys them; it is kept to show the difference.

        Raises:
            ValueError: ``d_state`` is not one of the levels, or the mode is unknown.
        """
        self._check_level(d_state)
        ssm = state.ssm_state
        if interpolation_mode == "linear":
            if d_state != ssm.shape[-1]:
                ssm = F.interpolate(ssm.flatten(1, 2), size=d_state, mode="linear").view(*ssm.shape[:3], d_state)
        elif interpolation_mode == "nested":
            ssm = F.pad(ssm, (0, d_state - ssm.shape[-1]))
        else:
            raise ValueError(f"interpolation_mode = {interpolation_mode!r} must be 'nested' or 'linear'")
        return BlockState(state.conv_state.clone(), ssm.clone())

    def resized(self, d_state: int, *, preserve_weights: bool = True) -> VariableStateSpaceModel:
        """A mixer of its own with a full state of ``d_state`` columns, any number from 1; this one is not changed.

        With ``preserve_weights`` it is the prefix of this one: fewer columns compute what this one does at that level,
        more read 0 from the new ones until trained. A level's scale s of C becomes D / s and norm_eps / s², since the
        gated norm divides by the size. Without, the weights are drawn anew.
        """
        kept = min(d_state, self.d_state)
        levels = (*(level for level in self.levels if level < d_state), d_state) if self._variable else (d_state,)
        with torch.no_grad():
            level = kept if kept in self.levels else self.d_state
            scale = self.query_scale(torch.tensor(level, device=self.D.device))
        eps = self.norm.eps / float(scale) ** 2 if preserve_weights else self.norm.eps
        shape = {**self._config.model_dump(), "d_state": d_state, "d_state_levels": levels, "norm_eps": eps}
        twin = VariableStateSpaceModel(self.width, ModelConfig(**shape), variable=self._variable)
        twin.to(self.D.device).train(self.training).requires_grad_(self.D.requires_grad)
        if not preserve_weights:
            return twin
        with torch.no_grad():
            for mine, new in zip(self._parts(), twin._parts(), strict=True):
                shared = min(len(mine), len(new))
                new[:shared].copy_(mine[:shared])
            for new in (twin.conv_weight, twin.conv_bias):
                new[self.d_inner + d_state + kept :] = 0.0  # C of columns that this one lacks
            twin.out_proj.weight.copy_(self.out_proj.weight)
            twin.D.copy_(self.D / scale)
            twin.norm.weight.copy_(self.norm.weight * scale.sign())
            if self._variable:
                smaller = torch.tensor(levels[:-1], device=self.D.device, dtype=torch.int64)
                twin.level_scale.copy_(self.query_scale(smaller) / scale)
                twin.tile_exponent.copy_(self.tile_exponent)
        return twin

    def _parts(self) -> list[Tensor]:
        """Views of what is laid out by channels: z and x, B, C, dt of the projections; x, B, C of the convolution."""
        convolved = [self.d_inner, self.d_state, self.d_state]
        projected = self.in_proj.weight.split([2 * self.d_inner, self.d_state, self.d_state, self.heads])
        taps, bias = self.conv_weight.split(convolved), self.conv_bias.split(convolved)
        read = () if self.propagation is None else self.propagation.weight.split([*convolved, self.heads])
        return [*projected, *taps, *bias, *read, self.dt_bias, self.A_log]

    def _check_level(self, d_state: int) -> None:
        if d_state not in self.levels:
            raise ValueError(f"d_state = {d_state} must be one of {self.levels}")

    def query_scale(self, columns: Tensor) -> Tensor:
        """Learned scale [...] of C at ``columns`` [...] columns, each one of the levels; 1 at the full size."""
        scales = torch.cat([self.level_scale, self.level_scale.new_ones(1)])
        return scales[torch.searchsorted(self.level_sizes, columns)]

    def _mask(self, B: Tensor, C: Tensor, columns: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        """B and C for a state of ``width`` columns, of which row i runs ``columns[i]`` (None: all of them).

        Args:
            B, C: [B, ..., N]. columns: [B].

        Returns:
            [B, ..., width] both, 0 in columns that do not run, C scaled for the level.
        """
        B, C = B[..., :width], C[..., :width]
        if columns is None:
            return (B, C) if width == self.d_state else (B, C * self.level_scale[self.levels.index(width)])
        shape = (-1, *[1] * (B.dim() - 1))
        running = torch.arange(width, device=B.device) < columns.view(shape)
        return B * running, C * running * self.query_scale(columns).view(shape)

    def _dt(self, raw: Tensor, stretch: Tensor | None) -> Tensor:
        """Step sizes [..., H] in fp32; ``stretch`` [...] is the number of bytes that each step stands for."""
        dt = F.softplus(raw.float() + self.dt_bias).clamp(self.least_dt, self.most_dt)
        if stretch is not None:
            dt = dt * torch.exp(self.tile_exponent * stretch.log().unsqueeze(-1))
        return dt

    def forward(
        self,
        hidden: Tensor,
        state: BlockState,
        stretch: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        columns: Tensor | None = None,
        propagated: Propagated | None = None,
    ) -> tuple[Tensor, BlockState, ScanTrace]:
        """Read L positions.

        Args:
            hidden: [B, L, D]. state: before them, not changed.
            stretch: [B, L] bytes per step, at least 1 (trunk only).
            lengths: [B] positions that count; what stands beyond is padding and leaves the state alone. None: all.
            columns: [B] of the state that run; None for all of them.
            propagated: the L bytes of which ``hidden`` [B, K, D] is at K (trunk only); their fires replace ``lengths``.

        Returns:
            output of the shape of ``hidden``, the state after, and the trace.
        """
        z, raw = self.in_proj(hidden).split([self.d_inner, self.conv_dim + self.heads], dim=-1)
        if propagated is not None:
            assert self.propagation is not None
            assert stretch is None
            raw, lengths = propagated.spread(raw, self.propagation(propagated.codes)), None
        xBC_raw, dt_raw = raw.split([self.conv_dim, self.heads], dim=-1)
        window = torch.cat([state.conv_state, xBC_raw], dim=1)
        quick = fused(hidden)
        if quick:
            x, keys = convolve_silu(window, self.conv_weight, self.conv_bias, self.d_inner)
            B, C = keys.split(self.d_state, dim=-1)
        else:
            taps = self.conv_weight.unsqueeze(1)
            mixed = F.conv1d(window.transpose(1, 2), taps, self.conv_bias, groups=self.conv_dim)
            xBC = F.silu(mixed.transpose(1, 2)).to(state.ssm_state.dtype)
            x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        B, C = self._mask(B, C, columns, state.ssm_state.shape[-1])
        if propagated is not None:
            written = torch.arange(B.shape[-1], device=B.device) < self.levels[0]
            B = B * (propagated.fires.unsqueeze(-1) | written)
        x = x.unflatten(-1, (self.heads, self.headdim))
        dt = self._dt(dt_raw, stretch)
        kept = state.conv_state.shape[1]
        if lengths is None:
            conv_state = window[:, window.shape[1] - kept :]
        else:
            dt = dt * (torch.arange(raw.shape[1], device=dt.device) < lengths.unsqueeze(1)).unsqueeze(-1)
            last = lengths.unsqueeze(1) + torch.arange(kept, device=dt.device)  # the last inputs that count
            conv_state = window.gather(1, last.unsqueeze(-1).expand(-1, -1, self.conv_dim))
        A = -torch.exp(self.A_log.float())
        with torch.autocast(hidden.device.type, enabled=False):  # the state and its sums keep their precision
            scan = (fused_scan if quick else ssd_scan)(
                x, dt, A, B, C, initial_state=state.ssm_state, chunk_size=self.chunk_size
            )
        trace = ScanTrace(*(value.detach() for value in (x, dt, A, B, C, scan.chunk_states)))
        y, x = (scan.y, x) if propagated is None else (propagated.select(scan.y), propagated.select(x))
        if quick:
            skip = self.D.repeat_interleave(self.headdim)
            normal = gate_norm(y.flatten(2), x.flatten(2), z, skip, self.norm.weight, self.norm.eps)
        else:
            normal = self.norm(torch.addcmul(y, x, self.D[:, None]).flatten(2), z)
        return self.out_proj(normal), BlockState(conv_state, scan.final_state), trace

    def step(
        self, hidden: Tensor, state: BlockState, rows: Tensor, stretch: Tensor | None, columns: Tensor
    ) -> tuple[Tensor, StepTrace]:
        """Read one position for some rows of a batch, whose state is advanced in place.

        Args:
            hidden: [n, D]. state: of B sequences. rows: [n] of them.
            stretch: [n] bytes that the step stands for, at least 1. columns: [n] of the state that run.

        Returns:
            output [n, D], and the trace.
        """
        z, new, dt_raw = self.in_proj(hidden).split([self.d_inner, self.conv_dim, self.heads], dim=-1)
        x, B, C = self._convolve_step(new, state, rows, columns)
        dt = self._dt(dt_raw, stretch)
        A = -torch.exp(self.A_log.float())
        before = state.ssm_state[rows]
        y, after = ssd_step(x, dt, A, B, C, before)
        y = torch.addcmul(y, x, self.D[:, None]).flatten(1)
        state.ssm_state.index_copy_(0, rows, after)
        missing = (0, self.d_state - B.shape[-1])
        change = (after - before).double().square().flatten(1).sum(1)
        trace = StepTrace(F.pad(B, missing), F.pad(C, missing), dt, dt * A, change)
        return self.out_proj(self.norm(y, z)), trace

    def propagate(self, codes: Tensor, state: BlockState, rows: Tensor, columns: Tensor) -> None:
        """Read one position for some rows of a batch, where the block is not run, into their state.

        Args:
            codes: [n, r]. state: of B sequences. rows: [n] of them. columns: [n] of the state that run.
        """
        assert self.propagation is not None
        new, dt_raw = self.propagation(codes).split([self.conv_dim, self.heads], dim=-1)
        x, B, C = self._convolve_step(new, state, rows, columns)
        B = B * (torch.arange(B.shape[-1], device=B.device) < self.levels[0])
        _, after = ssd_step(x, self._dt(dt_raw, None), -torch.exp(self.A_log.float()), B, C, state.ssm_state[rows])
        state.ssm_state.index_copy_(0, rows, after)

    def _convolve_step(
        self, new: Tensor, state: BlockState, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, H, P], and B and C [n, N] for the columns that run, of inputs [n, C]; conv_state takes them in."""
        window = torch.cat([state.conv_state[rows], new.unsqueeze(1)], dim=1)
        state.conv_state.index_copy_(0, rows, window[:, 1:])
        xBC = F.silu((window * self.conv_weight.t()).sum(1) + self.conv_bias)
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        return x.unflatten(-1, (self.heads, self.headdim)), *self._mask(B, C, columns, state.ssm_state.shape[-1])


class AdaptiveMambaBlock(Viewed[BlockViews]):
    """Pre-norm residual block around :class:`VariableStateSpaceModel`."""

    def __init__(self, width: int, config: ModelConfig, *, variable: bool = False) -> None:
        super().__init__()
        self.norm = RMSNorm(width, config.norm_eps)
        self.mixer = VariableStateSpaceModel(width, config, variable=variable)

    def resize_state_space(self, d_state: int, preserve_weights: bool = True) -> None:
        """Give the block a full state of ``d_state`` columns; live states are resized by the mixer or the router.

        See :meth:`VariableStateSpaceModel.resized`. Optimisers that hold the old parameters must be made anew.
        """
        self.mixer = self.mixer.resized(d_state, preserve_weights=preserve_weights)
        self._views = None

    def forward(
        self,
        hidden: Tensor,
        state: BlockState,
        stretch: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        columns: Tensor | None = None,
        propagated: Propagated | None = None,
        traced: bool = True,
    ) -> tuple[Tensor, BlockState, ScanTrace | None]:
        """``hidden`` [B, L, D] with the block's update added; see the mixer.

        ``traced`` says whether the trace will be looked at; if not, it may be left out.
        """
        if compiled(hidden):
            output, (after,), trace = read_stack(
                [self.views()], hidden, [state], stretch, lengths, columns, propagated, traced=traced
            )
            return output, after, trace
        normal = self.norm(hidden)
        update, after, trace = self.mixer(
            normal, state, stretch, lengths=lengths, columns=columns, propagated=propagated
        )
        return hidden + update, after, trace

    def step(
        self, hidden: Tensor, state: BlockState, rows: Tensor, stretch: Tensor | None, columns: Tensor
    ) -> tuple[Tensor, StepTrace]:
        """The same for one position [n, D]; see the mixer."""
        update, trace = self.mixer.step(self.norm(hidden), state, rows, stretch, columns)
        return hidden + update, trace

    def _make_views(self) -> BlockViews:
        mixer = self.mixer
        per_head = torch.stack([mixer.dt_bias, mixer.A_log, mixer.D, mixer.tile_exponent])
        conv = torch.cat([mixer.conv_weight.t(), mixer.conv_bias.unsqueeze(0)])
        weights = (mixer.level_sizes, mixer.level_scale, conv, per_head, mixer.norm.weight)
        arrays = [value.detach().numpy() for value in weights]
        norm = self.norm.weight.detach().numpy()
        matrices = [readable(one.weight, frozen=not self.training) for one in (mixer.in_proj, mixer.out_proj)]
        limits = (mixer.least_dt, mixer.most_dt)
        return BlockViews(
            in_proj=mixer.in_proj.weight.detach().t(),
            out_proj=mixer.out_proj.weight.detach().t(),
            norm=(norm, self.norm.eps),
            gate_norm=(arrays[4], mixer.norm.eps),
            A_log=arrays[3][1],
            propagation=None if mixer.propagation is None else mixer.propagation.weight.detach().t(),
            chunk_size=mixer.chunk_size,
            mixer=(*arrays[:4], *limits),
            step=(*arrays, *matrices, norm, *limits, mixer.norm.eps, self.norm.eps),
        )
