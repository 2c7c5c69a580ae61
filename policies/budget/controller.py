"""The controller: takes, for each request, the plan that is worth its price.

Each target has a dual price λ, in quality per unit of its resource. A request takes the plan that
maximises predicted quality - Σ λ·expected cost, within its own ceilings. Prices are solved again
and again, beside the requests, so that what is left of the window's budget lasts for the traffic
still to come (`pace`, `reserve`, `prices`); spending is corrected by what was measured, so the aim
holds whatever the estimates miss.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from policies.base import Decision, ModelFacts, Query
from policies.budget.candidates import Key, candidates, key_of, plan_of
from policies.budget.costs import Coefficients, Corrections, CostModel, expected_costs
from policies.budget.pace import Horizon, Pace
from policies.budget.prices import Frontier, Samples, frontiers, levels_of, solve_prices
from policies.budget.reserve import allowance
from policies.budget.targets import Target, spent
from policies.errors import PolicyError
from policies.footprint import Footprint, estimate
from policies.laws.ensemble import EnsembleLaw
from policies.limits import NO_LIMITS, Limits
from policies.plan import Answer, Plan

# Prices wait for this many requests, then are solved again after so many more, after this share of
# those that are expected to come, or after so many seconds.
_FIRST_SOLVE = 24
_SOLVE_EVERY_REQUESTS = 256
_SOLVE_EVERY_SHARE = 0.03
_SOLVE_EVERY_LEAST = 3
_SOLVE_EVERY_S = 300.0
# While the requests to come become half, a price rises or falls at most by 2 to these powers: it
# follows what may be a passing error slowly, yet in time. What was overspent nobody brings back.
_HASTE_UP = 12.0
_HASTE_DOWN = 8.0
# Samples keep ensembles up to this multiple of n*, so that a falling price finds larger ones.
_MEMBERS_MARGIN = 2


class Controller:
    """Chooses plans so that targets hold on average over a window. Thread-safe, without I/O.

    Prices are not solved within a request: whoever owns the controller calls `solve` beside them,
    every second or so, and between two calls all pay the same prices.

    Windows follow each other from Unix time zero (a day is a UTC day) and each stands alone: what
    one saved or overspent is not carried into the next.

    One controller serves one policy in one process. Replicas that share a target `reconcile` with a
    shared record of what all have spent; each solves its own prices from that.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, ModelFacts],
        clock: Callable[[], float],
        targets: Sequence[Target] = (),
        law: EnsembleLaw | None = None,
        groups: Sequence[Sequence[str]] = (),
        limits: Limits = NO_LIMITS,
        expected_output_tokens: int = 128,
        window_s: float = 86_400,
        num_samples: int = 2048,
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
        self._num_samples = num_samples
        self._costs = CostModel(models, names)
        self._corrections = Corrections()
        self._latencies = Corrections()
        self._pace = Pace(window_s=window_s, announced=announced)
        self._samples: Samples | None = None
        self._fresh: deque[tuple[list[float], list[list[float]]]] = deque(maxlen=num_samples)
        self._prices = (0.0,) * len(targets)
        self._spent = [0.0] * len(targets)
        self._pending = [0.0] * len(targets)
        self._since_solve = 0
        self._to_come = math.inf
        self._settled = False
        self._solved_s = -math.inf
        self._mean_member: Coefficients | None = None
        self._lock = threading.Lock()

    def prices(self) -> dict[str, float]:
        """Return the current price per resource: quality (0 to 1) per USD, Wh or gCO2e."""
        return {t.resource: price for t, price in zip(self.targets, self._prices, strict=True)}

    def spent(self) -> dict[str, float]:
        """Return what this window has cost so far, what is still running at its estimate."""
        return {t.resource: total for t, total in zip(self.targets, self._spent, strict=True)}

    def choose(self, query: Query, decision: Decision) -> Decision:
        """Return `decision` with the plan that is worth its price, and what it weighed.

        `details["budget"]` holds the plan's predicted `quality`, its `expected` cost per targeted
        resource, the `prices`, the number of plans `considered`, `n_star` where the ensemble law
        bounds the members, and `unmet`: the limits that no plan meets (the cheapest plan is then
        returned, or the best one if only the quality floor is out of reach).
        """
        now_s = self._clock()
        with self._lock:
            self._reprice()
        prices = self._prices
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
        if unmet and unmet != ("quality_floor",):
            # It cannot run within its limits: the router refuses it, and it costs nothing.
            expected = [0.0] * len(self.targets)
        else:
            expected = [cost_C[best] for cost_C in expected_RC]
        if self.targets:
            self._note(now_s, qualities, expected_RC, expected)
        chosen = keys[best]
        plan = plan_of(chosen, decision)
        details: dict[str, Any] = {
            "quality": qualities[best],
            "expected": dict(zip(self._resources, expected, strict=True)),
            "prices": dict(zip(self._resources, prices, strict=True)),
            "considered": len(keys),
            "unmet": list(unmet),
        }
        if n_star < math.inf:
            details["n_star"] = n_star
        return Decision(
            plan=plan,
            scores=decision.scores,
            reason=_reason(decision, chosen, unmet),
            details={**decision.details, "budget": details},
            limited=True,
        )

    def observe(self, query: Query, decision: Decision, cost: Footprint) -> None:
        """Settle a request that this controller chose: `cost` is what it really was."""
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
            prompt_tokens, output_tokens = query.prompt_tokens, self._output_tokens(query)
            priced = 0.0
            for price, (per_prompt, per_output) in zip(prices, self._member_cost(), strict=True):
                priced += price * (per_prompt * prompt_tokens + per_output * output_tokens)
            n_star = self._law.optimal_members(1.0, priced)
        return candidates(
            decision,
            law=self._law,
            groups=self._groups,
            max_members=_MEMBERS_MARGIN * math.ceil(n_star) if math.isfinite(n_star) else n_star,
        ), n_star

    def _member_cost(self) -> Coefficients:
        """Return what the mean fusible member costs; members of a group are alike in size."""
        if self._mean_member is None:
            every = [
                [
                    (read * factor, written * factor)
                    for read, written in self._costs.coefficients(name)
                ]
                for name, factor in zip(
                    self._fusible, map(self._corrections.factor, self._fusible), strict=True
                )
            ]
            self._mean_member = tuple(
                (
                    sum(read for read, _ in column) / len(column),
                    sum(written for _, written in column) / len(column),
                )
                for column in zip(*every, strict=True)
            )
        return self._mean_member

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
        qualities: list[float],
        expected_RC: list[list[float]],
        expected: Sequence[float],
    ) -> None:
        """Count a request at what it is `expected` to cost; keep its candidates as a sample."""
        with self._lock:
            self._count(now_s, 1)
            self._fresh.append((qualities, expected_RC))
            self._since_solve += 1
            for index, amount in enumerate(expected):
                self._spent[index] += amount
                self._pending[index] += amount

    def _count(self, now_s: float, num_requests: int) -> None:
        intensity = self._costs.gco2e_per_wh
        if self._pace.count(now_s, intensity=intensity, requests=num_requests):
            self._spent = [0.0] * len(self.targets)
            self._settled = False

    def _reprice(self) -> None:
        before = self._costs.gco2e_per_wh
        if self._costs.refresh():
            after = self._costs.gco2e_per_wh
            self._take_samples()
            if self._samples is not None and before > 0:
                for index, target in enumerate(self.targets):
                    if target.resource == "gco2e":
                        self._samples.rescale(index, after / before)
            self._mean_member = None
            self._solved_s = -math.inf

    def _take_samples(self) -> None:
        """Move the candidates of the last requests to the samples."""
        while self._fresh:
            qualities, costs_RC = self._fresh.popleft()
            if self._samples is None or not self._samples.fits(len(qualities)):
                self._samples = Samples(
                    size=self._num_samples,
                    max_candidates=2 * len(qualities),
                    num_resources=len(self.targets),
                )
            self._samples.add(qualities, costs_RC)

    def due(self) -> bool:
        """Return whether `solve` has something to do; cheap."""
        num_samples = len(self._fresh) + (self._samples.num_samples if self._samples else 0)
        idle = not self._since_solve and self._solved_s > -math.inf
        if idle or num_samples < _FIRST_SOLVE:
            return False
        # Early on, new samples teach much: then a quarter more of them is reason enough. Late, few
        # requests are a large share of those to come.
        enough = min(
            _SOLVE_EVERY_REQUESTS,
            num_samples // 4,
            max(_SOLVE_EVERY_LEAST, _SOLVE_EVERY_SHARE * self._to_come),
        )
        return self._since_solve >= enough or self._clock() - self._solved_s >= _SOLVE_EVERY_S

    def solve(self) -> None:
        """Solve prices again if it is time to; takes milliseconds, while requests go on.

        To be called beside the requests, every second or so, by one thread at a time.
        """
        if not self.targets or not self.due():
            return
        now_s = self._clock()
        with self._lock:
            self._reprice()
            self._count(now_s, 0)
            self._take_samples()
            assert self._samples is not None
            num_samples = self._samples.num_samples
            qualities, costs = self._samples.view()
            since_solve, self._since_solve = self._since_solve, 0
            self._solved_s = now_s
        # Without the lock: this takes a while, and requests need it.
        reach = frontiers(qualities, costs)
        with self._lock:
            horizon = self._pace.horizon(now_s, likely=self._likely_requests(reach))
            allowances = [
                self._allowance(target, total, horizon, reach[index])
                for index, (target, total) in enumerate(zip(self.targets, self._spent, strict=True))
            ]
            self._to_come = horizon.num_requests
        solved = solve_prices(
            qualities,
            costs,
            allowances=allowances,
            levels=levels_of(
                horizon.requests,
                horizon.intensity,
                follows=[target.resource == "gco2e" for target in self.targets],
            ),
            start=self._prices,
        )
        if self._settled:
            # Forecasts err, most of all on a day that goes wrong: the price follows step by step.
            passed = since_solve / horizon.num_requests
            solved = tuple(map(partial(_limited, passed=passed), solved, self._prices))
        with self._lock:
            self._prices = solved
            self._settled = num_samples >= _SOLVE_EVERY_REQUESTS
            self._mean_member = None

    def _allowance(
        self, target: Target, spent: float, horizon: Horizon, frontier: Frontier
    ) -> float:
        """Return what the mean request to come may cost in the resource of `target`."""
        window_s = self._pace.window_s
        # Of the next window, only the share that its forecast traffic may spend.
        due = target.budget(
            elapsed_s=self._pace.elapsed_s + horizon.seconds + horizon.beyond * window_s,
            num_requests=self._pace.num_requests + horizon.num_requests,
        )
        if target.per != "hour":
            # More requests bring more budget: they are nothing to be afraid of.
            return max(0.0, due - spent) / horizon.num_requests
        return allowance(
            left=due - spent,
            budget=target.budget(elapsed_s=window_s, num_requests=0),
            window_left=horizon.seconds / window_s,
            requests=horizon.requests,
            weights=horizon.intensity
            if target.resource == "gco2e"
            else np.ones_like(horizon.requests),
            frontier=frontier,
        )

    def _likely_requests(self, reach: Sequence[Frontier]) -> tuple[float, float] | None:
        """Return how many requests a window has if the targets are neither idle nor impossible.

        Fewer than the first could all take their best plan, more than the second not even their
        cheapest. Of several targets per hour, the tightest; None where there is none.
        """
        found = []
        for target, frontier in zip(self.targets, reach, strict=True):
            if target.per == "hour" and frontier.cheapest > 0:
                budget = target.budget(elapsed_s=self._pace.window_s, num_requests=0)
                found.append((budget / frontier.dearest, budget / frontier.cheapest))
        return min(found, default=None)


def _limited(price: float, before: float, *, passed: float) -> float:
    """Return `price`, or what is next to it within the steps allowed; from zero it is free.

    `passed` are the requests since `before`, relative to those to come.
    """
    if not before:
        return price
    down, up = (
        math.exp(sign * min(haste * passed, 100.0))
        for sign, haste in ((-1, _HASTE_DOWN), (1, _HASTE_UP))
    )
    return min(max(price, before * down), before * up)


def _size(cost: Footprint) -> tuple[float, float, float]:
    return (cost.usd, cost.wh, cost.latency_s)


def _reason(decision: Decision, chosen: Key, unmet: Sequence[str]) -> str:
    if unmet:
        return f"{decision.reason}; no plan meets {', '.join(unmet)}"
    if chosen == key_of(decision.plan):
        return f"{decision.reason}; worth its price"
    return f"{decision.reason}; another plan is the better bargain"
