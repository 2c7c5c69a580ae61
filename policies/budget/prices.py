"""Dual prices: what a unit of each resource must cost so that the budget lasts.

Sample-average dual: the last requests' candidates (their predicted quality and cost) stand for the
ones to come. A price vector λ is right when, with each of them taking the plan that maximises
quality - Σ λ·cost, their mean cost is what the budget allows per request. This is the dual of the
offline linear program, solved again and again on fresh samples (Agrawal, Wang and Ye 2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

# Prices are found to this relative precision; quality is flat around the best one.
_PRECISION = 0.01
# The highest price: saving what the cheapest plan costs is then worth this many right answers.
# Beyond, all that decides is hair's breadths between plans that cost alike, which estimates do not
# know; where a budget cannot be kept, giving up quality for them would not keep it either.
_DEAREST = 1.0
_SWEEPS = 3
# Future hours are grouped into this many levels of carbon intensity.
_MAX_LEVELS = 4
# The search for a price starts with this step: from one solution to the next it moves little.
_STEP = 1.1
NOT_A_CANDIDATE = -1e9
# The prices, relative to the highest one, at which a frontier is looked at.
_FRONTIER = np.geomspace(1.0, 1e-4, 16)


class Samples:
    """A ring of the last requests' candidates; not thread-safe.

    Unused candidates have a quality that no price makes attractive.
    """

    def __init__(self, *, size: int, max_candidates: int, num_resources: int) -> None:
        self._qualities = np.full((size, max_candidates), NOT_A_CANDIDATE)
        self._costs_RSC = np.zeros((num_resources, size, max_candidates))
        self._next = 0
        self._num_candidates = 1
        self.num_samples = 0

    def fits(self, num_candidates: int) -> bool:
        """Return whether a request with so many candidates can be taken."""
        return num_candidates <= self._qualities.shape[1]

    def add(self, qualities: Sequence[float], costs_RC: Sequence[Sequence[float]]) -> None:
        """Take one request's candidates, replacing the oldest request's."""
        row = self._next
        num = len(qualities)
        self._num_candidates = max(self._num_candidates, num)
        self._qualities[row, :num] = qualities
        self._qualities[row, num:] = NOT_A_CANDIDATE
        for costs_SC, costs in zip(self._costs_RSC, costs_RC, strict=True):
            costs_SC[row, :num] = costs
        self._next = (row + 1) % len(self._qualities)
        self.num_samples = min(self.num_samples + 1, len(self._qualities))

    def rescale(self, resource: int, factor: float) -> None:
        """Multiply every cost in one resource (the grid's intensity has changed)."""
        self._costs_RSC[resource] *= factor

    def view(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return copies of the samples' qualities [S, C] and costs [S, C, R]."""
        used = slice(self.num_samples), slice(self._num_candidates)
        return self._qualities[used].copy(), np.stack([c[used] for c in self._costs_RSC], axis=2)


@dataclass(frozen=True, kw_only=True)
class Level:
    """A part of the future: its share of the requests and, per resource, its cost factor."""

    share: float
    factors: tuple[float, ...]


def levels_of(
    requests: NDArray[np.float64], intensity: NDArray[np.float64], *, follows: Sequence[bool]
) -> list[Level]:
    """Group future bins into a few levels of carbon intensity.

    `requests` and `intensity` (relative to now's) are per bin; `follows` says, per resource,
    whether its costs follow the intensity.
    """
    total = float(requests.sum())
    if total <= 0:
        return [Level(share=1.0, factors=(1.0,) * len(follows))]
    order = np.argsort(intensity, kind="stable")
    weight, factor = requests[order], intensity[order]
    middle = (np.cumsum(weight) - weight / 2) / total
    group = np.minimum((middle * _MAX_LEVELS).astype(int), _MAX_LEVELS - 1)
    levels = []
    for index in np.unique(group):
        here = group == index
        share = float(weight[here].sum())
        if share > 0:
            mean = float((weight[here] * factor[here]).sum()) / share
            factors = tuple(mean if each else 1.0 for each in follows)
            levels.append(Level(share=share / total, factors=factors))
    return levels


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The mean quality that a mean cost in one resource buys; both rise from point to point."""

    costs: NDArray[np.float64]
    qualities: NDArray[np.float64]

    @property
    def cheapest(self) -> float:
        """The mean cost of the cheapest plans."""
        return float(self.costs[0])

    @property
    def dearest(self) -> float:
        """The mean cost of the best plans: more than this cannot be spent."""
        return float(self.costs[-1])

    def quality_at(self, cost: float) -> float:
        """Return the mean quality that this mean cost buys."""
        return float(np.interp(cost, self.costs, self.qualities))

    def cost_of(self, quality: float) -> float:
        """Return the mean cost at which this mean quality is had."""
        return float(np.interp(quality, self.qualities, self.costs))


def frontiers(qualities_SC: NDArray[np.float64], costs_SCR: NDArray[np.float64]) -> list[Frontier]:
    """Return each resource's frontier, from the samples' cheapest plans to their best ones."""
    real_SC = qualities_SC > NOT_A_CANDIDATE / 2
    rows = np.arange(len(qualities_SC))
    found = []
    for costs_SC in np.moveaxis(costs_SCR, 2, 0):
        picks = [np.where(real_SC, costs_SC, np.inf).argmin(axis=1)]
        ceiling = _DEAREST / max(float(costs_SC[rows, picks[0]].mean()), 1e-30)
        picks += [(qualities_SC - price * costs_SC).argmax(axis=1) for price in _FRONTIER * ceiling]
        picks.append(qualities_SC.argmax(axis=1))
        means = [(costs_SC[rows, p].mean(), qualities_SC[rows, p].mean()) for p in picks]
        # Where plans cost alike, the cheapest may be worse than what the highest price takes.
        costs, qualities = np.maximum.accumulate(np.array(means), axis=0).T
        found.append(Frontier(costs=costs, qualities=qualities))
    return found


def solve_prices(
    qualities_SC: NDArray[np.float64],
    costs_SCR: NDArray[np.float64],
    *,
    allowances: Sequence[float],
    levels: Sequence[Level],
    start: Sequence[float],
) -> tuple[float, ...]:
    """Return a price per resource, in quality per unit, that meets the mean cost allowed.

    A resource whose allowance the best plans keep anyway costs nothing; one whose allowance not
    even the cheapest plans keep has the highest price. Several resources are solved in turn, each
    with the others' prices fixed.
    """
    prices = list(start)
    scaled = [costs_SCR * np.array(level.factors) for level in levels]
    rows = np.arange(len(qualities_SC))

    def mean_cost(resource: int, price: float) -> float:
        prices[resource] = price
        total = 0.0
        for level, costs in zip(levels, scaled, strict=True):
            value = qualities_SC.copy()
            for index, each in enumerate(prices):
                if each:
                    value -= each * costs[:, :, index]
            total += level.share * float(costs[rows, value.argmax(axis=1), resource].mean())
        return total

    def too_cheap(resource: int, allowance: float, price: float) -> bool:
        # What keeps the allowance exactly must not miss it by a rounding error.
        return mean_cost(resource, price) > allowance * (1 + 1e-9)

    real = qualities_SC > NOT_A_CANDIDATE / 2
    least = [
        sum(level.share * level.factors[resource] for level in levels)
        * float(np.min(costs_SCR[:, :, resource], axis=1, initial=np.inf, where=real).mean())
        for resource in range(len(prices))
    ]
    for _ in range(_SWEEPS if len(prices) > 1 else 1):
        for resource, allowance in enumerate(allowances):
            guess = prices[resource]
            if too_cheap(resource, allowance, 0.0):
                ceiling = _DEAREST / max(least[resource], 1e-30)
                low, high = _bracket(
                    partial(too_cheap, resource, allowance), guess or 0.01 * ceiling, ceiling
                )
                while high > low * (1 + _PRECISION):
                    middle = math.sqrt(low * high)
                    if too_cheap(resource, allowance, middle):
                        low = middle
                    else:
                        high = middle
                prices[resource] = high
    return tuple(prices)


def _bracket(
    too_cheap: Callable[[float], bool], guess: float, ceiling: float
) -> tuple[float, float]:
    """Return prices around the right one, searched outwards from `guess` in growing steps.

    Where even `ceiling` is too cheap, it is returned twice.
    """
    factor = _STEP
    low = high = min(guess, ceiling)
    if too_cheap(guess):
        while high < ceiling:
            high = min(high * factor, ceiling)
            if not too_cheap(high):
                return low, high
            low, factor = high, factor**1.5
        return ceiling, ceiling
    while True:
        low = high / factor
        if too_cheap(low):
            return low, high
        high, factor = low, factor**1.5
