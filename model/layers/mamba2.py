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
from model.layers.norm import RMSNorm
from model.ops.rows import linear_rows, softplus_rows
from model.ops.ssd import ScanTrace, ssd_scan, ssd_step
from model.state import BlockState, zero_block_state


class VariableStateSpaceModel(nn.Module):
    """The Mamba-2 mixer with nested state sizes: a state of n columns is the first n columns of the full one.

    Args:
        width: model width D.
        config: shape; ``d_state_levels`` matter only if ``variable``.
        variable: whether the state size may change, and a step may stand for several bytes (the trunk).
    """

    def __init__(self, width: int, config: ModelConfig, *, variable: bool) -> None:
        super().__init__()
        self.width = width
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
        if variable:
            self.tile_exponent = nn.Parameter(torch.zeros(self.heads))
            self.level_scale = nn.Parameter(torch.ones(len(self.levels) - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values of Mamba-2: A in [1, 16], dt log-uniform in [1e-3, 1e-1]."""
        nn.init.normal_(self.in_proj.weight, std=0.02)
        nn.init.normal_(self.out_proj.weight, std=0.02)
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

    def _check_level(self, d_state: int) -> None:
        if d_state not in self.levels:
            raise ValueError(f"d_state = {d_state} must be one of {self.levels}")

    def _columns(self, B: Tensor, C: Tensor, d_state: int) -> tuple[Tensor, Tensor]:
        """The first ``d_state`` columns of B and C [..., N], C scaled for that level."""
        if d_state == self.d_state:
            return B, C
        scale = self.level_scale[self.levels.index(d_state)]
        return B[..., :d_state], C[..., :d_state] * scale

    def _dt(self, raw: Tensor, stretch: Tensor | None) -> Tensor:
        """Step sizes [..., H] in fp32; ``stretch`` [...] is the number of bytes that each step stands for."""
        dt = softplus_rows(raw.float() + self.dt_bias)
        if stretch is not None:
            dt = dt * torch.exp(self.tile_exponent * stretch.log().unsqueeze(-1))
        return dt

    def forward(
        self, hidden: Tensor, state: BlockState, stretch: Tensor | None = None
    ) -> tuple[Tensor, BlockState, ScanTrace]:
        """Read L positions.

        Args:
            hidden: [B, L, D]. state: before them, not changed; its ``d_state`` is the one that runs.
            stretch: [B, L] bytes per step, at least 1 (trunk only).

        Returns:
            output [B, L, D], the state after, and the trace.
        """
        z, xBC_raw, dt_raw = self.in_proj(hidden).split([self.d_inner, self.conv_dim, self.heads], dim=-1)
        window = torch.cat([state.conv_state, xBC_raw], dim=1)
        mixed = F.conv1d(window.transpose(1, 2), self.conv_weight.unsqueeze(1), self.conv_bias, groups=self.conv_dim)
        xBC = F.silu(mixed.transpose(1, 2))
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        B, C = self._columns(B, C, state.ssm_state.shape[-1])
        x = x.unflatten(-1, (self.heads, self.headdim))
        dt = self._dt(dt_raw, stretch)
        A = -torch.exp(self.A_log.float())
        scan = ssd_scan(x, dt, A, B, C, initial_state=state.ssm_state, chunk_size=self.chunk_size)
        y = torch.addcmul(scan.y, x, self.D[:, None]).flatten(2)
        trace = ScanTrace(*(t.detach() for t in (x, dt, A, B, C, scan.chunk_states, scan.final_state)))
        after = BlockState(window[:, window.shape[1] - state.conv_state.shape[1] :], scan.final_state)
        return self.out_proj(self.norm(y, z)), after, trace

    def step(
        self, hidden: Tensor, state: BlockState, stretch: Tensor | None = None
    ) -> tuple[Tensor, BlockState, ScanTrace]:
        """Read one position: ``hidden`` [B, D], ``stretch`` [B]. Otherwise as :meth:`forward`, L axis dropped."""
        z, new, dt_raw = linear_rows(hidden, self.in_proj.weight).split(
            [self.d_inner, self.conv_dim, self.heads], dim=-1
        )
        window = torch.cat([state.conv_state, new.unsqueeze(1)], dim=1)
        xBC = F.silu((window * self.conv_weight.t()).sum(1) + self.conv_bias)
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        B, C = self._columns(B, C, state.ssm_state.shape[-1])
        x = x.unflatten(-1, (self.heads, self.headdim))
        dt = self._dt(dt_raw, stretch)
        A = -torch.exp(self.A_log.float())
        y, ssm_state = ssd_step(x, dt, A, B, C, state.ssm_state)
        y = torch.addcmul(y, x, self.D[:, None]).flatten(1)
        trace = ScanTrace(
            x.unsqueeze(1), dt.unsqueeze(1), A, B.unsqueeze(1), C.unsqueeze(1), state.ssm_state.unsqueeze(1),
            ssm_state,
        )  # fmt: skip
        output = linear_rows(self.norm(y, z), self.out_proj.weight)
        return output, BlockState(window[:, 1:], ssm_state), trace


class AdaptiveMambaBlock(nn.Module):
    """Pre-norm residual block around :class:`VariableStateSpaceModel`; returns the update, not the sum."""

    def __init__(self, width: int, config: ModelConfig, *, variable: bool = False) -> None:
        super().__init__()
        self.norm = RMSNorm(width, config.norm_eps)
        self.mixer = VariableStateSpaceModel(width, config, variable=variable)

    def forward(
        self, hidden: Tensor, state: BlockState, stretch: Tensor | None = None
    ) -> tuple[Tensor, BlockState, ScanTrace]:
        """The residual update [B, L, D] for ``hidden`` [B, L, D]; see the mixer."""
        update, after, trace = self.mixer(self.norm(hidden), state, stretch)
        return update, after, trace

    def step(
        self, hidden: Tensor, state: BlockState, stretch: Tensor | None = None
    ) -> tuple[Tensor, BlockState, ScanTrace]:
        """The residual update [B, D] for one position; see the mixer."""
        return self.mixer.step(self.norm(hidden), state, stretch)
