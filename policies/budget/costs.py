"""What candidates are expected to cost: rates that may change, corrected by what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from policies.base import ModelFacts
from policies.budget.candidates import Key
from policies.budget.targets import Resource, spent
from policies.footprint import Rates, estimate
from policies.plan import Answer, Plan

_MAX_REMEMBERED = 4096


# An estimate is linear in tokens: per resource, its cost per prompt token and per output token.
Coefficients: TypeAlias = tuple[tuple[float, float], ...]


class CostModel:
    """Estimates at the models' current rates.

    `models` may be a live mapping whose rates change with the grid's intensity: `refresh` notices.
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

    def refresh(self) -> bool:
        """Take over new rates, if there are any; return whether there were."""
        rates = self._models[self._anchor].rates
        if rates is self._anchor_rates:
            return False
        self.rates = {name: facts.rates for name, facts in self._models.items()}
        self._anchor_rates = rates
        self._by_part = {}
        return True

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
