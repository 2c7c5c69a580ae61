"""The plans a budget can choose from, how good each is, and what it is expected to cost.

A policy's own plan, trimmed, grown, or a single member. Costs are estimates at rates that may
change with the grid, corrected by what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeAlias

from policies.base import Decision, ModelFacts
from policies.budget.prices import Resource, spent
from policies.footprint import Rates, estimate
from policies.laws.scaling import EnsembleLaw
from policies.plan import Answer, Best, Cascade, Plan, children, with_parts

# What stands for a candidate in caches: an Answer's members (weights cost nothing), or the plan.
Key: TypeAlias = tuple[str, ...] | Plan
# An estimate is linear in tokens: per resource, its cost per prompt token and per output token.
Coefficients: TypeAlias = tuple[tuple[float, float], ...]

# What a member's quality is taken to be where the policy predicts none: all alike.
_UNKNOWN_QUALITY = 0.5
_MAX_REMEMBERED = 4096


def candidates(
    decision: Decision,
    *,
    law: EnsembleLaw | None,
    groups: Sequence[Sequence[str]],
    max_members: float = math.inf,
) -> dict[Key, float]:
    """Return the plans to choose from, by their keys, and their predicted qualities in [0, 1].

    First the policy's own plan, then that plan trimmed, larger ones first; then every member that
    the policy scored, alone; then, of each group that may be fused, the best-scored 2, 3 ... up to
    `max_members`. Where qualities tie, the earlier candidate is meant to win.

    The quality of an ensemble of k is its members' mean score plus what the law says k gain
    together, b (1 - k^-a); of a cascade that of its best stage, as the others only save.
    """
    plan, scores = decision.plan, decision.scores
    found: dict[Key, float] = {key_of(plan): plan_quality(plan, scores, law)}
    add = found.setdefault
    if not isinstance(plan, Answer) or len(plan.members) > 1:
        for trimmed in _trimmed(plan, max_members):
            add(key_of(trimmed), plan_quality(trimmed, scores, law))
    for name, score in scores.items():
        add((name,), score)
    for group in groups:
        known = [name for name in group if name in scores]
        ranked = sorted(known, key=scores.__getitem__, reverse=True)
        gains = _gains(law, len(ranked))
        total = 0.0
        for size, name in enumerate(ranked, start=1):
            if size > max_members:
                break
            total += scores[name]
            if size > 1:
                add(tuple(ranked[:size]), total / size + gains[size - 1])
    for key, quality in found.items():
        if not 0.0 <= quality <= 1.0:
            found[key] = min(max(quality, 0.0), 1.0)
    return found


@cache
def _gains(law: EnsembleLaw | None, num_members: int) -> tuple[float, ...]:
    """Return what one, two ... members gain together; a pool has one law."""
    return tuple(law.gain(size + 1) if law else 0.0 for size in range(num_members))


def plan_quality(plan: Plan, scores: Mapping[str, float], law: EnsembleLaw | None) -> float:
    """Return the predicted quality of `plan` (see `candidates`)."""
    if isinstance(plan, Answer):
        known = [scores.get(name, _UNKNOWN_QUALITY) for name in plan.members]
        weights = plan.weights or (1.0,) * len(known)
        mean = sum(w * q for w, q in zip(weights, known, strict=True)) / sum(weights)
        return mean + (law.gain(len(known)) if law else 0.0)
    parts = [plan_quality(child, scores, law) for child in children(plan)]
    if isinstance(plan, Best):
        return sum(parts) / len(parts) + (law.gain(len(parts)) if law else 0.0)
    return max(parts)


def key_of(plan: Plan) -> Key:
    """Return what stands for `plan` in caches."""
    return plan.members if isinstance(plan, Answer) else plan


def plan_of(key: Key, decision: Decision) -> Plan:
    """Return the plan that `key` stands for; what is left of a fusion is fused as it was."""
    if not isinstance(key, tuple):
        return key
    own = decision.plan
    if not isinstance(own, Answer) or own.rule == "contrastive" or len(key) == 1:
        same = isinstance(own, Answer) and own.members == key
        return own if same else Answer(members=key)
    if own.members == key:
        return own
    weight_of = dict(zip(own.members, own.weights or (1.0,) * len(own.members), strict=True))
    weights = tuple(weight_of.get(name, 0.0) for name in key)
    keeps_weights = own.weights is not None and min(weights) > 0
    return replace(own, members=key, weights=weights if keeps_weights else None)


def _trimmed(plan: Plan, max_members: float) -> list[Plan]:
    """Return smaller versions of `plan`, larger ones first."""
    if isinstance(plan, Answer):
        size = len(plan.members)
        if plan.rule == "contrastive":
            # Its members have roles: what can be left of it is the first one, alone.
            return [Answer(members=plan.members[:1])]
        weights = plan.weights or (1.0,) * size
        # The heaviest members stay; on equal weights, and as the lead of a gate, the first ones.
        lead = plan.rule == "gated"
        order = sorted(range(size), key=lambda i: -math.inf if lead and not i else -weights[i])
        largest = min(size - 1, max_members)
        return [
            Answer(members=tuple(plan.members[index] for index in order[:keep]))
            for keep in range(int(largest), 0, -1)
        ]
    parts = children(plan)
    fewer = [
        with_parts(plan, dict(enumerate(parts[:keep]))) for keep in range(len(parts) - 1, 1, -1)
    ]
    return [*fewer, *(reversed(parts) if isinstance(plan, Cascade) else parts)]


class CostModel:
    """Estimates at the models' current rates.

    `models` may be a live mapping whose rates follow the grid's intensity: `refresh` notices.
    Coefficients are remembered between changes, as a few plans serve most requests.
    """

    def __init__(self, models: Mapping[str, ModelFacts], resources: Sequence[Resource]) -> None:
        self._models = models
        self._resources = tuple(resources)
        # One model's rates stand for all: a live mapping reprices every model at once.
        self._anchor = next(iter(models))
        self._anchor_rates = models[self._anchor].rates
        self._by_part: dict[str | Plan, Coefficients] = {}
        self.rates: dict[str, Rates] = {name: facts.rates for name, facts in models.items()}

    @property
    def gco2e_per_wh(self) -> float:
        """The grid's intensity behind the current rates (the first model's)."""
        return self._anchor_rates.gco2e_per_wh

    def refresh(self) -> None:
        """Take over new rates, if there are any."""
        rates = self._models[self._anchor].rates
        if rates is not self._anchor_rates:
            self.rates = {name: facts.rates for name, facts in self._models.items()}
            self._anchor_rates = rates
            self._by_part = {}

    def coefficients(self, part: str | Plan) -> Coefficients:
        """Return the coefficients of a member or a plan, in the order of the resources."""
        found = self._by_part.get(part)
        if found is None:
            plan = Answer(members=(part,)) if isinstance(part, str) else part
            read = estimate(plan, self.rates, prompt_tokens=1, output_tokens=0)
            written = estimate(plan, self.rates, prompt_tokens=0, output_tokens=1)
            found = tuple(
                (spent(read, resource), spent(written, resource)) for resource in self._resources
            )
            if len(self._by_part) >= _MAX_REMEMBERED:
                self._by_part = {}
            self._by_part[part] = found
        return found


class Corrections:
    """How measured costs compare with estimates, by member (or by plan where it is no Answer).

    Answers are shorter or longer than expected, cascades stop early: the running mean of measured
    over estimated cost turns an estimate into an expectation. What was never chosen is taken to be
    like everything else, so that a wrong guess of lengths does not rule it out for ever.
    """

    # Means over the first observations, then exponential with this weight.
    _MIN_WEIGHT = 0.02

    def __init__(self) -> None:
        self._ratios: dict[str | Plan, tuple[float, int]] = {}
        self._overall = (1.0, 0)

    def factor(self, part: str | Plan) -> float:
        """Return by what to multiply the estimate of a member or a plan."""
        found = self._ratios.get(part)
        return self._overall[0] if found is None else found[0]

    def learn(self, key: Key, *, measured: float, estimated: float) -> None:
        """Take one measurement; an estimate of zero teaches nothing."""
        if estimated <= 0:
            return
        ratio = measured / estimated
        for part in key if isinstance(key, tuple) else (key,):
            # What is believed of all the others counts like one observation.
            mean, count = self._ratios.get(part, (self._overall[0], 1))
            self._ratios[part] = self._updated(mean, count, ratio)
        self._overall = self._updated(*self._overall, ratio)

    def _updated(self, mean: float, count: int, ratio: float) -> tuple[float, int]:
        weight = max(1 / (count + 1), self._MIN_WEIGHT)
        return mean + weight * (ratio - mean), count + 1


def expected_costs(
    keys: Iterable[Key],
    costs: CostModel,
    corrections: Corrections,
    *,
    resource: int,
    prompt_tokens: int,
    output_tokens: int,
) -> list[float]:
    """Return what the plans that `keys` stand for are expected to cost in one resource.

    Fused members cost the sum of theirs.
    """
    coefficients, factor = costs.coefficients, corrections.factor
    known: dict[str | Plan, float] = {}
    found = []
    for key in keys:
        total = 0.0
        for part in key if isinstance(key, tuple) else (key,):
            cost = known.get(part)
            if cost is None:
                read, written = coefficients(part)[resource]
                cost = (read * prompt_tokens + written * output_tokens) * factor(part)
                known[part] = cost
            total += cost
        found.append(total)
    return found
