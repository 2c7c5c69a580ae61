"""Targets, and the dual price that holds each: what a unit of its resource must cost.

Each target has a price λ in quality per unit. A request takes the plan that maximises quality -
Σ λ·cost; where it is expected to cost more than is allowed, the price rises, else it falls. This is
dual mirror descent with the entropy (Balseiro, Lu and Mirrokni 2020): λ is multiplied by
exp(η (cost - allowed) / allowed), so one step serves costs of any size.

What is allowed depends on how much traffic the rest of the window holds, and how dirty its
electricity will be: whoever spends evenly by the clock pays too much at night and starves at noon.
Both are learned by time of window from the windows before (`Pace`, which knows nothing of costs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from policies.footprint import Footprint
from policies.kinds import Settings

NUM_BINS = 96
# How far the windows before yield to the last one: it counts half.
_SMOOTHING = 0.5
# Counts are averaged over this many bins each side, so that yesterday's bursts do not recur.
_SMOOTH_BINS = 2
# Today's level is that of the windows before, until as much traffic as twice theirs says otherwise:
# bursts pass.
_LEVEL_PRIOR = 2.0
# In a first window, one minute is the least to judge a rate by.
_MIN_ELAPSED_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What is left of a window: `seconds`, its `share`, and the `requests` that it may hold.

    `dirty_requests` are these in requests at the present carbon intensity: one that comes when the
    grid is twice as dirty counts twice. Both are at least one. `known` says that a whole window
    has been seen before.
    """

    seconds: float
    share: float
    requests: float
    dirty_requests: float
    known: bool


class Pace:
    """Counts requests by time of window and forecasts the rest of it. Not thread-safe."""

    def __init__(
        self, *, window_s: float, announced: Callable[[float], float | None] | None = None
    ) -> None:
        """Take the windows' length and what tells the intensity announced for a Unix time."""
        self.window_s = window_s
        self.num_requests = 0.0
        self._announced = announced
        self._bin_s = window_s / NUM_BINS
        self._window: int | None = None
        self._started_s = 0.0
        self._counts = np.zeros(NUM_BINS)
        self._intensities = np.full(NUM_BINS, np.nan)
        self._usual_counts: NDArray[np.float64] | None = None
        self._usual_intensities: NDArray[np.float64] | None = None
        self._forecast()

    @property
    def started_s(self) -> float:
        """Unix time from which on requests of this window could be seen."""
        return self._started_s

    def count(self, now_s: float, *, intensity: float, requests: int = 1) -> bool:
        """Count requests at `now_s` at this carbon intensity; return whether a window began."""
        window = int(now_s // self.window_s)
        began = window != self._window
        if began:
            self._begin(now_s, window)
        here = self._bin(now_s)
        self._counts[here] += requests
        self._intensities[here] = intensity
        self.num_requests += requests
        return began

    def reconcile(self, now_s: float, *, num_requests: int, first_request_s: float) -> None:
        """Count what others know of this window: `num_requests` in all since `first_request_s`.

        To be called in a window that has begun. Requests that were not counted here are put where
        they may have been: since the last time, or evenly since the first one after a restart.
        """
        first = here = self._bin(now_s)
        if first_request_s < self._started_s:
            self._started_s = first_request_s
            first = min(self._bin(first_request_s), here)
        missing = num_requests - self.num_requests
        if missing > 0:
            self._counts[first : here + 1] += missing / (here + 1 - first)
            self.num_requests += missing

    def rest(self, now_s: float) -> Rest:
        """Return the forecast from `now_s` to the end of the window; takes microseconds."""
        passed_s = now_s % self.window_s
        here = self._bin(now_s)
        ahead = here + 1 - passed_s / self._bin_s
        usual, dirty = (
            sums[here + 1] + ahead * (sums[here] - sums[here + 1]) for sums in self._to_come
        )
        total = self._to_come[0][0]
        if self._usual_counts is None:
            # Flat, at the rate seen so far; the sums are in bins.
            seen_s = max(now_s - self._started_s, _MIN_ELAPSED_S)
            level = self.num_requests / (seen_s / self._bin_s)
        else:
            prior = _LEVEL_PRIOR * total
            level = (self.num_requests + prior) / max(total - usual + prior, 1e-9)
        relative = self._rhythm[here]
        left_s = self.window_s - passed_s
        return Rest(
            seconds=left_s,
            share=left_s / self.window_s,
            requests=max(1.0, level * usual),
            dirty_requests=max(1.0, level * (dirty / relative if relative > 0 else usual)),
            known=self._usual_counts is not None,
        )

    def _bin(self, now_s: float) -> int:
        return min(NUM_BINS - 1, int((now_s % self.window_s) / self._bin_s))

    def _begin(self, now_s: float, window: int) -> None:
        # A window that was seen only in part says nothing of the part that was not.
        if self._window is not None and self._started_s % self.window_s < self._bin_s:
            self._usual_counts = _blend(self._usual_counts, _smooth(self._counts))
            self._usual_intensities = _blend(self._usual_intensities, _filled(self._intensities))
        self._started_s = now_s if self._window is None else window * self.window_s
        self._window = window
        self.num_requests = 0.0
        self._counts = np.zeros(NUM_BINS)
        self._intensities = np.full(NUM_BINS, np.nan)
        self._forecast()

    def _forecast(self) -> None:
        """Sum up, from each bin to the window's end, the usual requests, plain and as dirty."""
        rhythm = self._expected_intensities()
        usual = np.ones(NUM_BINS) if self._usual_counts is None else self._usual_counts
        self._rhythm: list[float] = rhythm.tolist()
        self._to_come: list[list[float]] = [
            [*np.cumsum(each[::-1])[::-1].tolist(), 0.0] for each in (usual, usual * rhythm)
        ]

    def _expected_intensities(self) -> NDArray[np.float64]:
        """Return the grid's rhythm: the announced one, else that of the windows before.

        A day that is dirtier than this rhythm is taken to stay so.
        """
        if self._announced is not None and self._window is not None:
            middles_s = (self._window + (np.arange(NUM_BINS) + 0.5) / NUM_BINS) * self.window_s
            announced = [self._announced(time_s) for time_s in middles_s.tolist()]
            if all(announced):
                return np.array(announced, dtype=np.float64)
        usual = self._usual_intensities
        if usual is None or not np.isfinite(usual).all():
            return np.ones(NUM_BINS)
        return usual


def _blend(old: NDArray[np.float64] | None, new: NDArray[np.float64]) -> NDArray[np.float64]:
    return new.copy() if old is None else _SMOOTHING * new + (1 - _SMOOTHING) * old


def _smooth(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the circular moving average."""
    shifts = range(-_SMOOTH_BINS, _SMOOTH_BINS + 1)
    mean: NDArray[np.float64] = np.mean([np.roll(counts, shift) for shift in shifts], axis=0)
    return mean


def _filled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `values` with the gaps of bins without requests filled from the one before."""
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
        return values
    before = np.maximum(np.searchsorted(known, np.arange(len(values)), side="right") - 1, 0)
    filled: NDArray[np.float64] = values[known[before]]
    return filled


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


class BudgetTarget(Settings):
    """Spend `amount` of `resource` per hour, or per 1,000 requests, on average over a window.

    A target is an aim held by a price, not a cap: use budgets for what must never be exceeded.
    """

    resource: Resource
    amount: float = Field(gt=0)
    per: Per = "hour"

    def __str__(self) -> str:
        """Say it in words."""
        per = "hour" if self.per == "hour" else "1,000 requests"
        return f"{self.amount:g} {self.resource} per {per}"

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
