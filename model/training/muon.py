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

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Matrices [..., m, n] with the singular vectors of ``matrix`` and singular values near 1."""
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    x = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x if wide is matrix else x.mT
    return result


class Muon(Optimizer):
    """Muon with Nesterov momentum, for parameters of two dimensions.

    Args:
        params: matrices. lr: as for AdamW. weight_decay: decoupled. momentum: of the gradient's running sum.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every matrix in place from its gradient."""
        for group in self.param_groups:
            for parameters in _launched_together([one for one in group["params"] if one.grad is not None]):
                directions = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1.0 - group["momentum"])
                    directions.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                scale = 0.2 * max(parameters[0].shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(torch.stack(directions)), strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)


def _launched_together(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Matrices by shape on a GPU, where a launch takes longer than such a product; else one by one."""
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for number, parameter in enumerate(parameters):
        key = (number,) if parameter.device.type == "cpu" else tuple(parameter.shape)
        groups.setdefault(key, []).append(parameter)
    return list(groups.values())
