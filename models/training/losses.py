"""What a training step minimises: the label loss, alone or mixed with distillation.

Distillation is Hinton, Vinyals and Dean 2015: at temperature τ, τ²·KL(teacher ‖ student). The
teacher is given by its K likeliest tokens at each position, renormalised, so it need not run
beside the student.

Shapes: `B` rows, `T` tokens a row, `K` tokens of the teacher, `V` vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models.training.forward import Geometry, Weights, packed_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """`weight` in [0, 1] is the share of the teacher in the loss, the label has the rest."""

    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature: {self.temperature} is not > 0")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"distill.weight: {self.weight} is not in [0, 1]")


def packed_loss(
    weights: Weights,
    *,
    tokens_BT: Tensor,
    segments_BT: Tensor,
    positions_BT: Tensor,
    targets_BT: Tensor,
    loss_weights_BT: Tensor,
    total_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    geometry: Geometry,
    distillation: Distillation | None = None,
    teacher_ids_BTK: Tensor | None = None,
    teacher_log_probabilities_BTK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What to minimise, and the label loss within it; both in nats, weighted sums.

    The sums are divided by `total_weight`, that of the whole step, so that the parts of an
    accumulated step add up. A position where the teacher says nothing (its first log-probability
    is positive) counts by its label alone.
    """
    logits_BTV = packed_logits(
        weights,
        tokens_BT=tokens_BT,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
        cos=cos,
        sin=sin,
        geometry=geometry,
    )
    flat = logits_BTV.flatten(0, 1)
    label_N = functional.cross_entropy(flat, targets_BT.reshape(-1), reduction="none")
    shares_N = loss_weights_BT.reshape(-1) / total_weight
    label = (label_N * shares_N).sum()
    if distillation is None or teacher_ids_BTK is None or teacher_log_probabilities_BTK is None:
        return label, label.detach()
    tau = distillation.temperature
    teacher_NK = (teacher_log_probabilities_BTK.flatten(0, 1).float() / tau).log_softmax(-1)
    student_NV = (flat / tau).log_softmax(-1)
    student_NK = student_NV.gather(-1, teacher_ids_BTK.flatten(0, 1).long())
    divergence_N = tau**2 * (teacher_NK.exp() * (teacher_NK - student_NK)).sum(-1)
    taught_N = teacher_log_probabilities_BTK[..., 0].reshape(-1) <= 0
    share = distillation.weight
    mixed_N = torch.where(taught_N, (1 - share) * label_N + share * divergence_N, label_N)
    return (mixed_N * shares_N).sum(), label.detach()
