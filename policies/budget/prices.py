"""Targets, and the dual price that holds each: what a unit of its resource must cost.

Each target has a price λ in quality per unit. A request takes the plan that maximises quality -
Σ λ·cost; where it is expected to cost more than is allowed, the price rises, else it falls. This is
dual mirror descent with the entropy (Balseiro, Lu and Mirrokni 2020): λ is multiplied by
exp(η (cost - allowed) / allowed), so one step serves costs of any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from policies.budget.pace import Rest
from policies.errors import PolicyError
from policies.footprint import Footprint

Resource: TypeAlias = Literal["usd", "wh", "gco2e"]
Per: TypeAlias = Literal["hour", "1000_requests"]

# The step η is this over the root of the requests to come, but at first, while a price is merely
# guessed, this over the requests seen; and never more than one.
_STEP = 3.0
_FIRST_STEP = 10.0
# One request counts as costing at most so many times more than is allowed.
_LARGEST_SURPRISE = 5.0
# Prices relative to one right answer per cost of the best plan: the first one, the least (below it
# nothing is given up, and the price is zero), and the highest where a cheapest plan costs nothing.
_FIRST, _LEAST, _HIGHEST = 0.1, 1e-4, 1e4
# Means of what the cheapest and the best plans cost: over the first requests, then exponential.
_MEAN_WEIGHT = 0.005
# Where a budget is spent, this share of what the cheapest, or the best, plans cost stays allowed.
_LEAST_ALLOWED, _LEAST_ALLOWED_OF_BEST = 0.05, 1e-3

# The rest of a window may be quieter by so many standard deviations of its (Poisson) requests: what
# they would have cost is spent before, as nobody spends it afterwards.
_QUIET_DEVIATIONS = 1.5
# What no forecast knows, a burst or a grid that turns dirty, can be made up for only as far as the
# cheapest plans go. A whole window's plan keeps back what this share of them costs, half a window's
# the half; but at most this share of what can be decided on at all, and on a first day that much.
_UNKNOWN = 0.75
_KEPT_BACK = 0.75


@dataclass(frozen=True, kw_only=True)
class BudgetTarget:
    """Spend `amount` of `resource` per hour, or per 1,000 requests, on average over a window.

    A target is an aim held by a price, not a cap: use budgets for what must never be exceeded.
    """

    resource: Resource
    amount: float
    per: Per = "hour"

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("resource", self.resource, get_args(Resource)),
            ("per", self.per, get_args(Per)),
        ):
            if value not in allowed:
                raise PolicyError(
                    f"targets.{key}: {value!r} is unknown; allowed are {', '.join(allowed)}"
                )
        is_number = isinstance(self.amount, int | float) and not isinstance(self.amount, bool)
        if not is_number or not 0 < self.amount < float("inf"):
            raise PolicyError(f"targets.amount: {self.amount!r} is not a number above zero")

    def budget(self, *, elapsed_s: float, num_requests: float) -> float:
        """Return what may be spent in `elapsed_s` seconds with `num_requests` requests."""
        if self.per == "hour":
            return self.amount * elapsed_s / 3600
        return self.amount * num_requests / 1000


def spent(cost: Footprint, resource: Resource) -> float:
    """Return how much of `resource` `cost` is."""
    return {"usd": cost.usd, "wh": cost.wh, "gco2e": cost.gco2e}[resource]


class DualPrice:
    """The price of one target's resource. Not thread-safe.

    `value` is in quality (0 to 1) per unit; zero until the best plans for everybody would cost more
    than is allowed. `cheapest` and `best` are what the cheapest and the best plans cost on average.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self.cheapest = 0.0
        self.best = 0.0
        self._num_requests = 0

    def allowed(self, target: BudgetTarget, *, left: float, rest: Rest) -> float:
        """Return what the next request may cost so that `left` lasts for the `rest`.

        `left` is what the window's budget still holds.
        """
        num_requests = rest.dirty_requests if target.resource == "gco2e" else rest.requests
        if target.per != "hour":
            # More requests bring more budget: they are nothing to be afraid of.
            allowed = left / rest.requests
        else:
            quiet = num_requests - _QUIET_DEVIATIONS * math.sqrt(num_requests)
            allowed = left / max(quiet, num_requests / 4, 1.0)
            kept_back = _KEPT_BACK * max(0.0, allowed - self.cheapest)
            if rest.known:
                kept_back = min(kept_back, _UNKNOWN * self.cheapest)
            allowed -= rest.share * kept_back
        return max(allowed, _LEAST_ALLOWED * self.cheapest, _LEAST_ALLOWED_OF_BEST * self.best)

    def see(self, *, cheapest: float, best: float) -> None:
        """Take what the cheapest plan of a request and the best one are expected to cost."""
        self._num_requests += 1
        weight = max(_MEAN_WEIGHT, 1 / self._num_requests)
        self.cheapest += weight * (cheapest - self.cheapest)
        self.best += weight * (best - self.best)

    def step(self, *, expected: float, allowed: float, to_come: float) -> None:
        """Move after a request that is `expected` to cost so much where so much was `allowed`.

        `to_come` are the requests that the window may still hold.
        """
        if self.best <= 0:
            return
        unit = 1 / self.best
        highest = min(_HIGHEST * unit, 1 / self.cheapest if self.cheapest > 0 else math.inf)
        if self.value:
            step = min(max(_STEP / math.sqrt(to_come), _FIRST_STEP / self._num_requests), 1.0)
            surprise = min((expected - allowed) / allowed, _LARGEST_SURPRISE)
            self.value = min(self.value * math.exp(step * surprise), highest)
            if self.value < _LEAST * unit:
                self.value = 0.0
        elif self.best > allowed:
            self.value = min(_FIRST * unit, highest)
