"""The losses of MPDistil, which says what they are for and where they are from (`mp_distil`).

Weighted sums over tokens in nats, as `packed_loss` has them, which `torch.compile` can take.
Shapes: `N` tokens, `S` student's width, `D` teacher's, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.training.forward import Weights, head_of, packed_states


def taught_loss(  # noqa: PLR0913 - torch.compile wants tensors, not what holds them
    weights: Weights,
    *,
    targets_BT: Tensor,
    loss_weights_BT: Tensor,
    total_weight: Tensor,
    states: Sequence[Tensor],
    head_VD: Tensor,
    bridge_DS: Tensor,
    pairs: Sequence[tuple[int, int]],
    weight: float,
    temperature: float,
    hidden_weight: float,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """The student's loss of step 1, and the label loss within it; weighted sums in nats.

    `states` are the teacher's `[B, T, D]`, `pairs` which of the student's is matched with which.
    """
    ours = packed_states(weights, **inputs)
    flat_NV = (ours[-1] @ head_of(weights).T).float().flatten(0, 1)
    told_NV = (states[-1].float() @ head_VD.T).flatten(0, 1)
    label_N = functional.cross_entropy(flat_NV, targets_BT.reshape(-1), reduction="none")
    distance_NV = (told_NV / temperature).softmax(-1) - (flat_NV / temperature).softmax(-1)
    soft_N = temperature**2 * distance_NV.pow(2).sum(-1)
    hidden_N = torch.stack([
        (_unit(ours[s].float() @ bridge_DS.T) - _unit(states[t].float())).pow(2).mean(-1).flatten()
        for s, t in pairs
    ]).mean(0)  # fmt: skip
    mixed_N = (1 - weight) * label_N + weight * soft_N + hidden_weight * hidden_N
    shares_N = loss_weights_BT.reshape(-1) / total_weight
    return (mixed_N * shares_N).sum(), (label_N * shares_N).sum().detach()


def outdoing_loss(
    weights: Weights,
    *,
    targets_BT: Tensor,
    loss_weights_BT: Tensor,
    total_weight: Tensor,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """The student's loss of step 3, CE - mean p_S(y), and the label loss within it."""
    flat_NV = (packed_states(weights, **inputs)[-1] @ head_of(weights).T).float().flatten(0, 1)
    log_N = flat_NV.log_softmax(-1).gather(-1, targets_BT.reshape(-1, 1))[:, 0]
    shares_N = loss_weights_BT.reshape(-1) / total_weight
    return ((-log_N - log_N.exp()) * shares_N).sum(), -(log_N * shares_N).sum().detach()


def meta_loss(
    head_VD: Tensor,
    told_ND: Tensor,
    heard_ND: Tensor,
    targets_N: Tensor,
    shares_N: Tensor,
    *,
    competitive: bool,
) -> Tensor:
    """The meta-teacher's loss of step 2, of the teacher's states and the student's."""
    told_N, heard_N = (
        states.matmul(head_VD.T).log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]
        for states in (told_ND, heard_ND)
    )
    if competitive:
        return ((-told_N - told_N.exp() + heard_N.exp()) * shares_N).sum()
    return (-0.5 * (told_N + heard_N) * shares_N).sum()


def _unit(states: Tensor) -> Tensor:
    return states * torch.rsqrt(states.pow(2).sum(-1, keepdim=True) + 1e-12)
