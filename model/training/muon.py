"""Muon: momentum orthogonalised by a Newton-Schulz iteration.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; the scale that matches AdamW's update size is from
Liu et al. 2025, "Muon is scalable for LLM training", section 2.2. ``torch.optim.Muon`` iterates in bfloat16 whatever
the machine, which took half of a training step on a CPU without bfloat16 units; this one iterates in the dtype of the
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from model.training.distributed import ALONE, Ranks

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Matrices [k, m, n] with the singular vectors of those given and singular values near 1."""
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = x if wide is matrices else x.mT
    return result


class Muon(Optimizer):
    """Muon with Nesterov momentum, for parameters of two dimensions.

    Args:
        params: matrices. lr: as for AdamW. weight_decay: decoupled. momentum: of the gradient's running sum.
        ranks: processes with the same parameters and gradients, which share the iterations out among them.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.ranks = ranks

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix in place from its gradient.

        Raises:
            ConnectionError: another process is gone.
        """
        for group in self.param_groups:
            together = _launched_together([one for one in group["params"] if one.grad is not None])
            directions = [
                torch.stack([self._direction(parameter, group["momentum"]) for parameter in parameters])
                for parameters in together
            ]
            for parameters, updates in zip(together, self._orthogonalised(directions), strict=True):
                scale = 0.2 * max(updates.shape[1:]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1.0 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)

    def _orthogonalised(self, directions: list[Tensor]) -> list[Tensor]:
        """Each process works out some of them, and has the others' from the others."""
        owners = _shared_out([one.numel() * min(one.shape[1:]) for one in directions], self.ranks.size)
        return self.ranks.sum_of_all(
            [
                orthogonalise(one) if owner == self.ranks.rank else torch.zeros_like(one)
                for one, owner in zip(directions, owners, strict=True)
            ]
        )


def _shared_out(costs: list[int], count: int) -> list[int]:
    """Who of ``count`` does what, the dearest first and always to who has least to do."""
    owners, load = [0] * len(costs), [0] * count
    for number in sorted(range(len(costs)), key=lambda one: -costs[one]):
        owners[number] = min(range(count), key=lambda one: load[one])
        load[owners[number]] += costs[number]
    return owners


def _launched_together(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Matrices by shape on a GPU, where a launch takes longer than such a product; else one by one."""
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for number, parameter in enumerate(parameters):
        key = (number,) if parameter.device.type == "cpu" else tuple(parameter.shape)
        groups.setdefault(key, []).append(parameter)
    return list(groups.values())
