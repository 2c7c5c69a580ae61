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
# A budget that not even the cheapest plans keep is treated as this much more than they cost: the
# last percents of saving would cost all the quality there is, and could not save the target.
_LEAST_OVER_CHEAPEST = 1.1
_SWEEPS = 3
_NOT_A_CANDIDATE = -1e9


class Samples:
    """A ring of the last requests' candidates; not thread-safe.

    `qualities_SC` and `costs_SCR` are [samples, candidates(, resources)]; unused candidates have a
    quality that no price makes attractive.
    """

    def __init__(self, *, size: int, max_candidates: int, num_resources: int) -> None:
        self._qualities = np.full((size, max_candidates), _NOT_A_CANDIDATE)
        self._costs = np.zeros((size, max_candidates, num_resources))
        self._next = 0
        self._num_candidates = 1
        self.num_samples = 0

    def fits(self, num_candidates: int) -> bool:
        """Return whether a request with so many candidates can be taken."""
        return num_candidates <= self._qualities.shape[1]

    def add(self, qualities: Sequence[float], costs: Sequence[Sequence[float]]) -> None:
        """Take one request's candidates, replacing the oldest request's."""
        row = self._next
        num = len(qualities)
        self._num_candidates = max(self._num_candidates, num)
        self._qualities[row, :num] = qualities
        self._qualities[row, num:] = _NOT_A_CANDIDATE
        self._costs[row, :num] = costs
        self._next = (row + 1) % len(self._qualities)
        self.num_samples = min(self.num_samples + 1, len(self._qualities))

    def rescale(self, resource: int, factor: float) -> None:
        """Multiply every cost in one resource (the grid's intensity has changed)."""
        self._costs[:, :, resource] *= factor

    def view(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return copies of qualities and costs of the samples there are."""
        used = slice(self.num_samples), slice(self._num_candidates)
        return self._qualities[used].copy(), self._costs[used].copy()


@dataclass(frozen=True, kw_only=True)
class Level:
    """A part of the future: its share of the requests and, per resource, its cost factor."""

    share: float
    factors: tuple[float, ...]


def solve_prices(
    qualities_SC: NDArray[np.float64],
    costs_SCR: NDArray[np.float64],
    *,
    allowances: Sequence[float],
    levels: Sequence[Level],
    start: Sequence[float],
) -> tuple[float, ...]:
    """Return a price per resource, in quality per unit, that meets the mean cost allowed.

    A resource whose allowance the best plans keep anyway costs nothing; an allowance below what the
    cheapest plans cost, or close to it, is raised to a tenth above that. Several resources are
    solved in turn, each with the others' prices fixed.
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
        return mean_cost(resource, price) > allowance

    real = qualities_SC > _NOT_A_CANDIDATE / 2
    least = [
        sum(level.share * level.factors[resource] for level in levels)
        * float(np.min(costs_SCR[:, :, resource], axis=1, initial=np.inf, where=real).mean())
        for resource in range(len(prices))
    ]
    for _ in range(_SWEEPS if len(prices) > 1 else 1):
        for resource, allowed in enumerate(allowances):
            allowance = max(allowed, _LEAST_OVER_CHEAPEST * least[resource])
            guess = prices[resource]
            if too_cheap(resource, allowance, 0.0):
                usual, ceiling = _scale(costs_SCR[:, :, resource], qualities_SC)
                low, high = _bracket(
                    partial(too_cheap, resource, allowance), guess or usual, ceiling
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
    factor = 1.5
    low = high = min(guess, ceiling)
    if too_cheap(guess):
        while high < ceiling:
            high = min(high * factor, ceiling)
            if not too_cheap(high):
                return low, high
            low, factor = high, factor * 1.5
        return ceiling, ceiling
    while True:
        low = high / factor
        if too_cheap(low):
            return low, high
        high, factor = low, factor * 1.5


def _scale(costs: NDArray[np.float64], qualities: NDArray[np.float64]) -> tuple[float, float]:
    """Return a price of the right order, and one at which nothing but cost counts."""
    real = costs[qualities > _NOT_A_CANDIDATE / 2]
    mean = max(float(real.mean()), 1e-30)
    return 1 / mean, 1e4 / mean
