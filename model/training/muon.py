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
    """A matrix [m, n] with the singular vectors of ``matrix`` and singular values near 1."""
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    x = wide / wide.norm().clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x if wide is matrix else x.t()
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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1.0 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(state["momentum"], group["momentum"]))
                scale = 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)
