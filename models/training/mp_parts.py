"""What MPDistil learns by and with: losses, head, bridge and policy; `mp_distil` says what for.

The losses are weighted sums over tokens in nats, as `packed_loss` has them, which `torch.compile`
can take. Shapes: `N` tokens, `S` student's width, `D` teacher's, `V` vocabulary, `C` domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from models.training.forward import Geometry, Weights, head_of, low_precision, packed_states


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
    **inputs: Any,  # noqa: ANN401 - as `packed_loss` takes them
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
    **inputs: Any,  # noqa: ANN401 - as `packed_loss` takes them
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


class Parts(nn.Module):
    """What learns beside the student: head `[V, D]`, bridge `[D, S]` and policy `[C, S]`."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, num_domains: int, *, seed: int
    ) -> None:
        """The head starts as the teacher's, the others by lot of this seed."""
        super().__init__()
        width, wide = int(student.config.hidden_size), int(teacher.config.hidden_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(wide, int(teacher.config.vocab_size), bias=False)
            self.bridge = nn.Linear(width, wide, bias=False)
            self.policy = nn.Linear(width, num_domains)
        with torch.no_grad():
            self.head.weight.copy_(head_of(low_precision(teacher, torch.float32)))


def matched(student: Geometry, teacher: Geometry) -> tuple[tuple[int, int], ...]:
    """Which states are matched: layers at the same share of the depth, and the last state."""
    ratio = teacher.num_layers / student.num_layers
    layers = ((i, round((i + 1) * ratio) - 1) for i in range(student.num_layers - 1))
    return (*layers, (student.num_layers, teacher.num_layers))


def _unit(states: Tensor) -> Tensor:
    return states * torch.rsqrt(states.pow(2).sum(-1, keepdim=True) + 1e-12)
