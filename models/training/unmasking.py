"""Selective updates (ID3, Agarwal et al. 2025, "Step-by-Step Unmasking"): few parameters learn, and
which ones is decided on the way.

Every step lets a few more parameters learn, those that are highest by |gradient| / (|weight| + ε)^x
just then (the paper's D3, section 3.2), until a share of all does; what has been let learn goes on.
With the exponent 0 the gradient alone decides, with a large one small weights come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.training.loop import Method


class Unmasking(Method):
    """Lets `share` of the parameters learn, as many more with each of `num_steps` steps.

    For AdamW without weight decay, which would move those that do not learn. Its second moments
    tell who has learned, so that a run that is resumed goes on with the same parameters.
    """

    def __init__(self, *, share: float, exponent: float, epsilon: float, num_steps: int) -> None:
        self._share, self._exponent, self._epsilon = share, exponent, epsilon
        self._num_steps = num_steps

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Method`."""
        return {"unmask": [self._share, self._exponent, self._epsilon]}

    @torch.no_grad()
    def before_update(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Choose who learns from this step on, and take the others' gradients away."""
        learned = [
            (parameter, parameter.grad, _has_learned(optimizer, parameter))
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        num_parameters = sum(parameter.numel() for parameter, _, _ in learned)
        wanted = round(self._share * num_parameters * min(1.0, (step + 1) / self._num_steps))
        num_new = wanted - sum(int(mask.sum()) for _, _, mask in learned)
        bar = torch.inf
        if num_new > 0:
            scores = torch.cat([
                torch.where(mask, -torch.inf, self._score(parameter, gradient)).flatten()
                for parameter, gradient, mask in learned
            ])  # fmt: skip
            bar = scores.topk(num_new).values[-1].item()
        for parameter, gradient, mask in learned:
            gradient.mul_(mask | (self._score(parameter, gradient) >= bar))

    def _score(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient.abs() / (parameter.abs() + self._epsilon) ** self._exponent


def _has_learned(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Return where AdamW has ever had a gradient of `parameter`."""
    moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
    return torch.zeros_like(parameter, dtype=torch.bool) if moment is None else moment > 0
