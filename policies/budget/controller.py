"""The controller: takes, for each request, the plan that is worth its price.

A request takes the plan that maximises predicted quality - Σ λ·expected cost, within its own
ceilings. Each target's price λ then moves by one step of dual descent (`prices`) towards what the
rest of the window allows (`pace`). Spending is corrected by what was measured, so the aim holds
whatever the estimates miss.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from policies.base import Decision, ModelFacts, Query
from policies.budget.candidates import (
    Corrections,
    CostModel,
    Key,
    candidates,
    expected_costs,
    key_of,
    plan_of,
    plan_quality,
)
from policies.budget.prices import BudgetTarget, DualPrice, Pace, spent
from policies.errors import PolicyError
from policies.footprint import NO_LIMITS, Footprint, Limits, estimate
from policies.laws.scaling import EnsembleLaw
from policies.plan import Answer, Plan

# Ensembles are looked at up to this multiple of n*, which is that of a member of mean cost.
_MEMBERS_MARGIN = 2


class Controller:
    """Chooses plans so that targets hold on average over a window. Thread-safe, without I/O.

    Windows follow each other from Unix time zero (a day is a UTC day) and each stands alone: what
    one saved or overspent is not carried into the next.

    One controller serves one policy in one process. Replicas that share a target `reconcile` with a
    shared record of what all have spent; each finds its own prices from that.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, ModelFacts],
        clock: Callable[[], float],
        targets: Sequence[BudgetTarget] = (),
        law: EnsembleLaw | None = None,
        groups: Sequence[Sequence[str]] = (),
        limits: Limits = NO_LIMITS,
        expected_output_tokens: int = 128,
        window_s: float = 86_400,
        announced: Callable[[float], float | None] | None = None,
    ) -> None:
        """Build a controller.

        `models` are the pool's, live where rates follow the grid; `clock` returns Unix time. `law`
        is the pool's ensemble law of the error rate (None: members of an ensemble gain nothing by
        being many). `groups` are models that may be fused. `limits` hold for every request, beside
        its own. `announced` returns the grid's intensity announced for a Unix time, None where
        nothing is. Raises `PolicyError` for two targets of one resource.
        """
        names = [target.resource for target in targets]
        if len(set(names)) != len(names):
            raise PolicyError(f"targets: each resource at most once, got {', '.join(names)}")
        self.targets = tuple(targets)
        self._resources = tuple(names)
        self._clock = clock
        self._law = law
        self._groups = tuple(tuple(group) for group in groups)
        self._fusible = [name for group in self._groups for name in group]
        self._limits = limits
        self._expected_output_tokens = expected_output_tokens
        self._costs = CostModel(models, names)
        self._corrections = Corrections()
        self._latencies = Corrections()
        self._pace = Pace(window_s=window_s, announced=announced)
        self._prices = tuple(DualPrice() for _ in targets)
        self._spent = [0.0] * len(targets)
        self._pending = [0.0] * len(targets)
        self._lock = threading.Lock()

    def prices(self) -> dict[str, float]:
        """Return the current price per resource: quality (0 to 1) per USD, Wh or gCO2e."""
        return {t.resource: p.value for t, p in zip(self.targets, self._prices, strict=True)}

    def spent(self) -> dict[str, float]:
        """Return what this window has cost so far, what is still running at its estimate."""
        return {t.resource: total for t, total in zip(self.targets, self._spent, strict=True)}

    def quality(self, decision: Decision) -> float:
        """Return the predicted quality of the plan that `decision` has, by the pool's law."""
        return min(max(plan_quality(decision.plan, decision.scores, self._law), 0.0), 1.0)

    def choose(self, query: Query, decision: Decision) -> Decision:
        """Return `decision` with the plan that is worth its price, and what it weighed.

        `details["budget"]` holds the plan's predicted `quality`, its `expected` cost per targeted
        resource, the `prices`, the number of plans `considered`, `n_star` where the ensemble law
        bounds the members, and `unmet`: the limits that no plan meets (the cheapest plan is then
        returned, or the best one if only the quality floor is out of reach).
        """
        now_s = self._clock()
        with self._lock:
            self._costs.refresh()
        prices = [price.value for price in self._prices]
        limits = self._limits.stricter(query.limits)
        found, n_star = self._candidates(query, decision, prices)
        keys, qualities = list(found), list(found.values())
        expected_RC = self._expected(keys, query)
        allowed, unmet = self._allowed(keys, qualities, query, limits)
        value_C = qualities
        for price, cost_C in zip(prices, expected_RC, strict=True):
            if price:
                value_C = [
                    value - price * cost for value, cost in zip(value_C, cost_C, strict=True)
                ]
        best = max(allowed, key=value_C.__getitem__)
        # What cannot run within its limits is refused by the router, and costs nothing.
        runs = not unmet or unmet == ("quality_floor",)
        expected = [cost_C[best] if runs else 0.0 for cost_C in expected_RC]
        if self.targets and runs:
            finest = max(range(len(keys)), key=qualities.__getitem__)
            self._note(
                now_s,
                expected,
                cheapest=[min(cost_C) for cost_C in expected_RC],
                best=[cost_C[finest] for cost_C in expected_RC],
            )
        chosen = keys[best]
        details: dict[str, Any] = {
            "quality": qualities[best],
            "expected": dict(zip(self._resources, expected, strict=True)),
            "prices": dict(zip(self._resources, prices, strict=True)),
            "considered": len(keys),
            "unmet": list(unmet),
        }
        if n_star < math.inf:
            details["n_star"] = n_star
        return replace(
            decision,
            plan=plan_of(chosen, decision),
            reason=_reason(decision, chosen, unmet),
            details={**decision.details, "budget": details},
            limited=True,
        )

    def observe(self, query: Query, decision: Decision, cost: Footprint) -> None:
        """Settle a request that this controller chose: `cost` is what it really was.

        `Footprint()` stands for one for which nothing ran: it leaves no trace.
        """
        key = key_of(decision.plan)
        if cost.latency_s > 0:
            usual = estimate(
                decision.plan,
                self._costs.rates,
                prompt_tokens=query.prompt_tokens,
                output_tokens=self._output_tokens(query),
            )
            with self._lock:
                self._latencies.learn(key, measured=cost.latency_s, estimated=usual.latency_s)
        if not self.targets:
            return
        expected = decision.details["budget"]["expected"]
        measured = [spent(cost, target.resource) for target in self.targets]
        with self._lock:
            for index, target in enumerate(self.targets):
                self._spent[index] += measured[index] - expected[target.resource]
                self._pending[index] -= expected[target.resource]
            if cost == Footprint():
                self._count(self._clock(), -1)
                return
            self._corrections.learn(key, measured=measured[0], estimated=self._estimate(key, query))

    def window_started_s(self, now_s: float) -> float:
        """Return the Unix time at which the window that holds `now_s` began."""
        return now_s - now_s % self._pace.window_s

    def reconcile(
        self, *, num_requests: int, spent: Mapping[str, float], first_request_s: float
    ) -> None:
        """Take over what a shared record says of this window: all replicas' requests, and earlier.

        `spent` maps resources to what settled requests cost since the window began, and
        `first_request_s` is the Unix time of the first of them. What this process still has running
        is added at its estimate.
        """
        now_s = self._clock()
        with self._lock:
            self._count(now_s, 0)
            self._pace.reconcile(now_s, num_requests=num_requests, first_request_s=first_request_s)
            for index, target in enumerate(self.targets):
                self._spent[index] = spent[target.resource] + self._pending[index]

    def _candidates(
        self, query: Query, decision: Decision, prices: Sequence[float]
    ) -> tuple[dict[Key, float], float]:
        n_star = math.inf
        if self._law is not None and self._fusible and any(prices):
            members = [(name,) for name in self._fusible]
            priced = sum(
                price * sum(cost_C) / len(cost_C)
                for price, cost_C in zip(prices, self._expected(members, query), strict=True)
            )
            n_star = self._law.optimal_members(1.0, priced)
        return candidates(
            decision,
            law=self._law,
            groups=self._groups,
            max_members=_MEMBERS_MARGIN * math.ceil(n_star) if math.isfinite(n_star) else n_star,
        ), n_star

    def _estimate(self, key: Key, query: Query) -> float:
        """Return the estimated cost of `key` in the first target's resource."""
        prompt_tokens, output_tokens = query.prompt_tokens, self._output_tokens(query)
        parts: Sequence[str | Plan] = key if isinstance(key, tuple) else (key,)
        total = 0.0
        for part in parts:
            per_prompt, per_output = self._costs.coefficients(part)[0]
            total += per_prompt * prompt_tokens + per_output * output_tokens
        return total

    def _expected(self, keys: Sequence[Key], query: Query) -> list[list[float]]:
        """Return, per resource, the estimates as corrected by what was measured before."""
        return [
            expected_costs(
                keys,
                self._costs,
                self._corrections,
                resource=resource,
                prompt_tokens=query.prompt_tokens,
                output_tokens=self._output_tokens(query),
            )
            for resource in range(len(self.targets))
        ]

    def _output_tokens(self, query: Query) -> int:
        expected = self._expected_output_tokens
        return min(expected, query.max_tokens) if query.max_tokens else expected

    def _allowed(
        self, keys: Sequence[Key], qualities: Sequence[float], query: Query, limits: Limits
    ) -> tuple[Sequence[int], tuple[str, ...]]:
        """Return the candidates within the limits, and the limits that none meets."""
        everything = range(len(keys))
        if limits is NO_LIMITS:
            return everything, ()
        within: Sequence[int] = everything
        if limits.caps_cost:
            worst = [self._worst_case(key, query) for key in keys]
            exceeded = [limits.exceeded(cost) for cost in worst]
            within = [index for index in everything if not exceeded[index]]
            if not within:
                cheapest = min(everything, key=lambda i: (len(exceeded[i]), _size(worst[i])))
                return [cheapest], exceeded[cheapest]
        floor = limits.quality_floor
        if floor is None:
            return within, ()
        good = [index for index in within if qualities[index] >= floor]
        if good:
            return good, ()
        return [max(within, key=qualities.__getitem__)], ("quality_floor",)

    def _worst_case(self, key: Key, query: Query) -> Footprint:
        """Return the cost of the longest answer; its latency as answers were measured to take."""
        plan: Plan = Answer(members=key) if isinstance(key, tuple) else key
        cost = estimate(
            plan,
            self._costs.rates,
            prompt_tokens=query.prompt_tokens,
            output_tokens=query.max_tokens or self._output_tokens(query),
        )
        slowest = max(map(self._latencies.factor, key if isinstance(key, tuple) else (key,)))
        return replace(cost, latency_s=cost.latency_s * slowest)

    def _note(
        self,
        now_s: float,
        expected: Sequence[float],
        *,
        cheapest: Sequence[float],
        best: Sequence[float],
    ) -> None:
        """Count a request at what it is `expected` to cost, and move the prices.

        `cheapest` and `best` are what its cheapest plan and its best one would have cost.
        """
        with self._lock:
            self._count(now_s, 1)
            rest = self._pace.rest(now_s)
            for index, (target, price) in enumerate(zip(self.targets, self._prices, strict=True)):
                self._spent[index] += expected[index]
                self._pending[index] += expected[index]
                due = target.budget(
                    elapsed_s=now_s + rest.seconds - self._pace.started_s,
                    num_requests=self._pace.num_requests + rest.requests,
                )
                price.see(cheapest=cheapest[index], best=best[index])
                allowed = price.allowed(target, left=due - self._spent[index], rest=rest)
                price.step(expected=expected[index], allowed=allowed, to_come=rest.requests)

    def _count(self, now_s: float, num_requests: int) -> None:
        intensity = self._costs.gco2e_per_wh
        if self._pace.count(now_s, intensity=intensity, requests=num_requests):
            self._spent = [0.0] * len(self.targets)


def _size(cost: Footprint) -> tuple[float, float, float]:
    return (cost.usd, cost.wh, cost.latency_s)


def _reason(decision: Decision, chosen: Key, unmet: Sequence[str]) -> str:
    if unmet:
        return f"{decision.reason}; no plan meets {', '.join(unmet)}"
    if chosen == key_of(decision.plan):
        return f"{decision.reason}; worth its price"
    return f"{decision.reason}; another plan is the better bargain"
