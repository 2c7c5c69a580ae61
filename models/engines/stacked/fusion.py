"""Fusing lanes: from each member's next-token distribution to each request's.

Shapes: L lanes, R requests, K lanes of a request at most, V vocabulary.

A rule maps log-probabilities [R, K, V], weights [R, K] (rows sum to one, padding zero) and the
lanes that lead to fused log-probabilities [R, V]. Adding one is one function and one entry in
`RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from models.engines.base import Evidence, FusionRule

# A token is plausible if the lead finds it at least this likely, relative to its likeliest.
PLAUSIBLE = 0.1


def mixture(logp_RKV: Tensor, weights_RK: Tensor) -> Tensor:
    """Σ_k w_k p_k, as log; a token that no member finds likelier than 1e-38 counts as that.

    Probabilities instead of logsumexp_k(log w_k + log p_k): half the time on CPU, and finite.
    """
    probs_RV = torch.bmm(weights_RK[:, None], logp_RKV.exp()).squeeze(1)
    return probs_RV.clamp_min_(torch.finfo(probs_RV.dtype).tiny).log_()


def product(logp_RKV: Tensor, weights_RK: Tensor) -> Tensor:
    """Π_k p_k^w_k, renormalised: a product of experts (Hinton 2002)."""
    return torch.bmm(weights_RK[:, None], logp_RKV).squeeze(1).log_softmax(-1)


def gated(logp_RKV: Tensor, weights_RK: Tensor, lead_RV: Tensor, gate_R: Tensor) -> Tensor:
    """The lead alone where its likeliest token has probability `gate` or more, else the mixture."""
    sure_R1 = lead_RV.amax(-1, keepdim=True) >= gate_R.log()[:, None]
    return torch.where(sure_R1, lead_RV, mixture(logp_RKV, weights_RK))


def contrastive(logp_RKV: Tensor, powers_RK: Tensor, lead_RV: Tensor) -> Tensor:
    """Π_k p_k^c_k, renormalised, over the tokens that the lead finds plausible.

    The powers sum to one and one of them is negative, so that a token which the anti-expert finds
    impossible would win; the plausibility constraint (Li et al. 2022, eq. 3) keeps it out.
    """
    score_RV = torch.bmm(powers_RK[:, None], logp_RKV).squeeze(1)
    plausible_RV = lead_RV >= lead_RV.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
    # Finite, as log-probabilities go into JSON.
    return score_RV.masked_fill_(~plausible_RV, -1e4).log_softmax(-1)


@dataclass(frozen=True)
class LaneWeights:
    """A request's fusion weights, in the order of its lanes; they sum to one, as the `prior` does.

    With `evidence` the members' own predictions set them: w_m ∝ prior_m · exp(l_m / T). The
    prompt's l_m costs one more product with the language-model head, on states that prefill has
    computed anyway.

    `log_likelihood` is what each lane said of `num_tokens` tokens, in nats; empty before the first.
    """

    prior: tuple[float, ...]
    evidence: Evidence | None = None
    log_likelihood: tuple[float, ...] = ()
    num_tokens: int = 0

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The weights by now."""
        if self.evidence is None or not self.num_tokens:
            return self.prior
        scale = self.evidence.temperature
        if self.evidence.per_token:
            scale *= self.num_tokens
        logs = [
            (math.log(weight) if weight > 0 else -math.inf) + value / scale
            for weight, value in zip(self.prior, self.log_likelihood, strict=True)
        ]
        highest = max(logs)
        raw = [math.exp(value - highest) for value in logs]
        return tuple(value / sum(raw) for value in raw)

    def heard(self, log_likelihood: Seq[float], num_tokens: int) -> LaneWeights:
        """Return the weights once each lane has said this of `num_tokens` more tokens."""
        so_far = self.log_likelihood or (0.0,) * len(self.prior)
        total = tuple(old + new for old, new in zip(so_far, log_likelihood, strict=True))
        return replace(self, log_likelihood=total, num_tokens=self.num_tokens + num_tokens)


@dataclass(frozen=True, slots=True)
class Fusion:
    """How one request's lanes are fused.

    `weights` sum to one, in the order of its lanes (for "contrastive": the powers); `lead` is the
    leading lane's place among them.
    """

    rule: FusionRule
    weights: tuple[float, ...]
    lead: int = 0
    gate: float = 1.0


def contrastive_powers(num_members: int, contrast: float) -> tuple[float, ...]:
    """Return the powers of two members (expert, anti-expert), or of three with a base before."""
    return (1 + contrast, -contrast) if num_members == 2 else (1.0, contrast, -contrast)


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
RULES: Mapping[FusionRule, Rule] = {
    "mixture": lambda logp, weights, lead, gate: mixture(logp, weights),  # noqa: ARG005
    "product": lambda logp, weights, lead, gate: product(logp, weights),  # noqa: ARG005
    "gated": gated,
    "contrastive": lambda logp, powers, lead, gate: contrastive(logp, powers, lead),  # noqa: ARG005
}


def fuse(logp_LV: Tensor, lanes_R: Seq[Seq[int]], fusions_R: Seq[Fusion]) -> Tensor:
    """Return each request's fused log-probabilities, [R, V].

    `logp_LV` are the lanes' own; `lanes_R` lists each request's lanes.
    """
    num_lanes = max(map(len, lanes_R))
    padded = [[*lanes, *[lanes[0]] * (num_lanes - len(lanes))] for lanes in lanes_R]
    flat = [lane for lanes in padded for lane in lanes]
    if flat != list(range(len(logp_LV))):
        logp_LV = logp_LV.index_select(0, torch.tensor(flat, device=logp_LV.device))
    if num_lanes == 1:
        return logp_LV
    logp_RKV = logp_LV.view(len(lanes_R), num_lanes, -1)
    weights_RK = logp_LV.new_tensor(
        [[*its.weights, *[0.0] * (num_lanes - len(its.weights))] for its in fusions_R]
    )
    lead_R = [its.lead for its in fusions_R]
    lead_RV = logp_RKV[range(len(lanes_R)), lead_R] if any(lead_R) else logp_RKV[:, 0]
    gate_R = logp_LV.new_tensor([its.gate for its in fusions_R])
    rules = {its.rule for its in fusions_R}
    if len(rules) == 1:
        return RULES[rules.pop()](logp_RKV, weights_RK, lead_RV, gate_R)
    fused_RV = logp_RKV.new_empty(len(lanes_R), logp_RKV.shape[-1])
    for rule in rules:
        of = [r for r, its in enumerate(fusions_R) if its.rule == rule]
        fused_RV[of] = RULES[rule](logp_RKV[of], weights_RK[of], lead_RV[of], gate_R[of])
    return fused_RV
