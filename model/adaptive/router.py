"""Between byte rate and tile rate, and between two state sizes.

Source: section 4.4.1 of the source document.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.ops.rows import take_rows
from model.state import RouterState


class CrossScaleRouter(nn.Module):
    """Projects between the widths, and holds the last update of the stage that is placed between its fires."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_state = config.d_state
        self.levels = config.d_state_levels
        self.stages = len(config.depths)
        if config.projected:
            self.down: nn.Linear | None = nn.Linear(config.d_model, config.d_trunk, bias=False)
            self.up: nn.Linear | None = nn.Linear(config.d_trunk, config.d_model, bias=False)
            nn.init.orthogonal_(self.down.weight)
            depths = config.shallow_depths
            shallow = {str(depth): nn.Linear(config.d_trunk, config.d_model, bias=False) for depth in depths}
            for up in (self.up, *shallow.values()):
                nn.init.normal_(up.weight, std=config.d_trunk**-0.5)
            self.shallow_up = nn.ModuleDict(shallow)
        else:
            self.down = self.up = None
            self.shallow_up = nn.ModuleDict()
        self.norm_eps = config.norm_eps
        self.code = nn.Linear(config.d_model, config.propagation_rank, bias=False) if config.propagation_rank else None
        if self.code is not None:
            nn.init.normal_(self.code.weight, std=config.d_model**-0.5)
        self.raw_fading = nn.Parameter(torch.full((config.d_model,), 2.0))
        self.fold = nn.ParameterDict({str(n): nn.Parameter(torch.zeros(n, self.d_state - n)) for n in self.levels[:-1]})
        self.later_codes = nn.ModuleList()
        for _ in config.shallow_depths if config.propagation_rank else ():
            code = nn.Linear(config.d_trunk, config.propagation_rank, bias=False)
            nn.init.normal_(code.weight, std=config.d_trunk**-0.5)
            self.later_codes.append(code)

    def to_trunk(self, selected: Tensor) -> Tensor:
        """Outer width to trunk width, [..., d_model] -> [..., d_trunk]."""
        return selected if self.down is None else self.down(selected)

    def from_trunk(self, update: Tensor, stage: int = 0) -> Tensor:
        """What a stage adds, trunk width to outer width, [..., d_trunk] -> [..., d_model]."""
        up = self.ups()[stage]
        return update if up is None else cast(Tensor, up(update))

    def ups(self) -> list[nn.Module | None]:
        """What :meth:`from_trunk` applies, by stage; None where the widths are equal."""
        if self.up is None:
            return [None] * self.stages
        return [*self.shallow_up.values(), self.up]

    def codes(self) -> list[nn.Module]:
        """What :meth:`propagated` applies, by stage; none where the states skip what the trunk skips."""
        return [] if self.code is None else [self.code, *self.later_codes]

    def propagated(self, inputs: Tensor, stage: int = 0) -> Tensor:
        """What a stage's states read of bytes where it does not fire, from what it is given, [..., propagation_rank].

        Source: state propagation of Schuster et al. 2022 (CALM), section 3.3: what a layer that is skipped would have
        stored is computed from the output of the last one that ran.
        """
        return cast(Tensor, self.codes()[stage](F.rms_norm(inputs, inputs.shape[-1:], eps=self.norm_eps)))

    def fade(self, held: Tensor, age: Tensor) -> Tensor:
        """``rho(age) * held``: rho = (1 + age)^-k, k > 0 learned per channel, so rho(0) = 1 exactly.

        Args:
            held: [..., d_model]. age: [...] bytes since the fire that made it.
        """
        rho = torch.exp(-F.softplus(self.raw_fading) * torch.log1p(age.to(held.dtype)).unsqueeze(-1))
        return torch.mul(held, rho)

    def take(self, updates: Tensor, state: RouterState) -> None:
        """Account in ``state`` for L positions that all fired, of which ``updates`` [B, L, d_model] are."""
        state.held = updates[:, -1]
        state.fires = state.fires + updates.shape[1]
        state.positions = state.positions + updates.shape[1]
        state.last_fire = state.positions.clone()  # a copy: the two are advanced in place

    def hold(self, updates: Tensor, fires: Tensor, state: RouterState) -> Tensor:
        """Updates at L positions [B, L, d_model], fading from fire to fire; ``state`` is advanced over them.

        Args:
            updates: [B, K, d_model] of a row's fires in order, then padding. fires: [B, L] bool, at most K in a row.
        """
        position = state.positions.unsqueeze(1) + torch.arange(1, fires.shape[1] + 1, device=fires.device)
        last = torch.where(fires, position, 0).cummax(1).values.maximum(state.last_fire.unsqueeze(1))
        known, slot = torch.cat([state.held.unsqueeze(1), updates], dim=1), fires.cumsum(1)
        spread = self.fade(take_rows(known, slot), position - last)
        state.held = known[torch.arange(len(known), device=known.device), slot[:, -1]]
        state.fires = state.fires + slot[:, -1]
        state.last_fire, state.positions = last[:, -1].clone(), position[:, -1].clone()
        return spread

    def route_states(self, ssm_state: Tensor, d_state: Tensor) -> Tensor:
        """Live states at other sizes: down with what is cut off folded in, up with zeros.

        Args:
            ssm_state: [B, H, P, N], zero in columns that do not run. d_state: [B] columns to run, each a level.

        Returns:
            [B, H, P, max(d_state)].

        Raises:
            ValueError: a size is not one of the levels.
        """
        sizes = d_state.unique().tolist()
        for size in sizes:
            if size not in self.levels:
                raise ValueError(f"d_state = {size} must be one of {self.levels}")
        width = ssm_state.shape[-1]
        routed = ssm_state.new_zeros(*ssm_state.shape[:-1], sizes[-1])
        for size in sizes:
            rows = (d_state == size).nonzero().squeeze(-1)
            state = ssm_state[rows]
            if size < width:
                state = state[..., :size] + state[..., size:] @ self.fold[str(size)][:, : width - size].t()
            routed[rows, ..., : state.shape[-1]] = state
        return routed
