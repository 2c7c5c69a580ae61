"""Muon: matrices are moved by their momentum made orthogonal (Jordan et al. 2024).

As torch.optim.Muon has it, in two respects faster on a CPU: the iteration runs in float32 where the
processor has no instructions for bfloat16 (there it took four fifths of a small model's training),
and matrices of one shape go through it together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor
from torch.nn import Parameter

from models.precision import fast_bfloat16

# The quintic of Jordan's reference: steep at zero, close enough to one elsewhere.
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS: Final = 5
_LEAST_NORM: Final = 1e-7
# Updates as large as AdamW's are on average, so that both take like rates (Liu et al. 2025).
_ADAMW_RMS: Final = 0.2


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the learning rate is one for AdamW's size of updates."""

    def __init__(
        self,
        parameters: Iterable[Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        """Train these matrices; `weight_decay` is per step and unit of learning rate."""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None, "gradients are made before"
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.device], list[Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault((matrix.shape, matrix.device), []).append(matrix)
            for (shape, _), matrices in alike.items():
                moved_NAB = torch.stack([self._moved(one, group["momentum"]) for one in matrices])
                rate = group["lr"] * _ADAMW_RMS * math.sqrt(max(shape))
                for one, update_AB in zip(matrices, orthogonal(moved_NAB), strict=True):
                    one.mul_(1 - group["lr"] * group["weight_decay"])
                    one.add_(update_AB, alpha=-rate)

    def _moved(self, matrix: Parameter, momentum: float) -> Tensor:
        """The gradient ahead of its running mean, which it is added to."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        mean: Tensor = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(mean, momentum)


def orthogonal(matrices_NAB: Tensor) -> Tensor:
    """Bring all singular values of each of N matrices near one (0.7 to 1.2), by Newton-Schulz."""
    x = matrices_NAB.bfloat16() if fast_bfloat16(matrices_NAB.device) else matrices_NAB.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(_LEAST_NORM)
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).to(matrices_NAB.dtype)
