"""Fusing lanes: from each member's next-token distribution to each request's.

Shapes: L lanes, R requests, K lanes of a request at most, V vocabulary.

A rule maps log-probabilities [R, K, V] and weights [R, K] (rows sum to one, padding zero) to fused
log-probabilities [R, V]. Adding one is one function and one entry in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from models.engines.base import FusionRule


def mixture(logp_RKV: Tensor, weights_RK: Tensor) -> Tensor:
    """Σ_k w_k p_k, as log: logsumexp_k(log w_k + log p_k)."""
    return torch.logsumexp(logp_RKV + weights_RK.log()[..., None], dim=1)


def product(logp_RKV: Tensor, weights_RK: Tensor) -> Tensor:
    """Π_k p_k^w_k, renormalised: a product of experts (Hinton 2002)."""
    return torch.bmm(weights_RK[:, None], logp_RKV).squeeze(1).log_softmax(-1)


RULES: Mapping[FusionRule, Callable[[Tensor, Tensor], Tensor]] = {
    "mixture": mixture,
    "product": product,
}


def fuse(
    logits_LV: Tensor,
    lanes_R: Seq[Seq[int]],
    weights_R: Seq[Seq[float]],
    rules_R: Seq[FusionRule],
) -> Tensor:
    """Return each request's fused log-probabilities, [R, V].

    `lanes_R` lists each request's lanes, `weights_R` their weights, which sum to one.
    """
    logp_LV = logits_LV.log_softmax(-1)
    num_lanes = max(map(len, lanes_R))
    padded = [[*lanes, *[lanes[0]] * (num_lanes - len(lanes))] for lanes in lanes_R]
    flat = [lane for lanes in padded for lane in lanes]
    if flat != list(range(len(logp_LV))):
        logp_LV = logp_LV.index_select(0, torch.tensor(flat, device=logp_LV.device))
    if num_lanes == 1:
        return logp_LV
    logp_RKV = logp_LV.view(len(lanes_R), num_lanes, -1)
    weights_RK = logp_LV.new_tensor(
        [[*weights, *[0.0] * (num_lanes - len(weights))] for weights in weights_R]
    )
    fused_RV: Tensor | None = None
    for rule in set(rules_R):
        if len(set(rules_R)) == 1:
            return RULES[rule](logp_RKV, weights_RK)
        if fused_RV is None:
            fused_RV = logp_RKV.new_empty(len(lanes_R), logp_RKV.shape[-1])
        requests = [r for r, its_rule in enumerate(rules_R) if its_rule == rule]
        fused_RV[requests] = RULES[rule](logp_RKV[requests], weights_RK[requests])
    assert fused_RV is not None
    return fused_RV
