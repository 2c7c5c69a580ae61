"""Weights that wait for a router: its predictions become the prior of a fusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from policies.plan import Answer, Cascade, Plan, children

# A member that the router expects nothing of still counts a little: evidence may know better.
_LEAST_WEIGHT = 1e-3


def best_members(answer: Answer, scores: Mapping[str, float], top: int | None) -> Answer:
    """Return `answer` with only the `top` best-scored of its members, the best first; None: all."""
    if top is None or top >= len(answer.members):
        return answer
    # A contrast's members have roles and never come with top: they take no router.
    ranked = sorted(answer.members, key=lambda name: -scores.get(name, 0.0))
    return replace(answer, members=tuple(ranked[:top]))


def needs_prior(plan: Plan) -> bool:
    """Return whether some answer's weights wait for the router."""
    if isinstance(plan, Answer):
        return plan.weighting in ("router", "evidence") and plan.weights is None
    return any(needs_prior(child) for child in children(plan))


def with_prior(plan: Plan, scores: Mapping[str, float], *, power: float = 1.0) -> Plan:
    """Return `plan` with the router's `scores` as weights, wherever some wait for it.

    Weights are score^power, normalised; a member without a score gets the mean of the others.
    Without any scores they stay uniform.
    """
    if isinstance(plan, Answer):
        known = [scores[name] for name in plan.members if name in scores]
        if not needs_prior(plan) or not known:
            return plan
        mean = sum(known) / len(known)
        raw = [max(scores.get(name, mean), _LEAST_WEIGHT) ** power for name in plan.members]
        return replace(plan, weights=tuple(weight / sum(raw) for weight in raw))
    inner = tuple(with_prior(child, scores, power=power) for child in children(plan))
    if isinstance(plan, Cascade):
        return replace(plan, stages=inner)
    return replace(plan, candidates=inner)


def without_prior(plan: Plan) -> Plan:
    """Return `plan` as it was before `with_prior`: scorers know stages by that."""
    if isinstance(plan, Answer):
        waits = plan.weighting in ("router", "evidence")
        return replace(plan, weights=None) if waits and plan.weights is not None else plan
    inner = tuple(without_prior(child) for child in children(plan))
    if isinstance(plan, Cascade):
        return replace(plan, stages=inner)
    return replace(plan, candidates=inner)
