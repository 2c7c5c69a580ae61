"""Routing metrics: APGR and CPT (RouteLLM, Ong et al. 2024), AIQ (RouterBench, Hu et al. 2024).

Shape legend: Q queries, M models, P points of a curve, R ranks of equal preference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_Z_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a router reaches at each cost, cheapest first: mean cost and mean quality, [P]."""

    cost_P: Floats
    quality_P: Floats


def two_model_curve(preference_Q: Floats, weak_Q: Floats, strong_Q: Floats) -> Curve:
    """Return quality against the share of calls to the strong model, at every threshold.

    The strong model gets the queries with the highest `preference`. No threshold parts equal ones:
    each of them counts with what they gain on average, however the rows are ordered.
    """
    _, rank_Q, size_R = np.unique(-preference_Q, return_inverse=True, return_counts=True)
    gain_R = np.bincount(rank_Q, strong_Q - weak_Q)
    num_queries = len(rank_Q)
    calls = np.arange(num_queries + 1)
    gains = np.interp(calls, [0, *np.cumsum(size_R)], [0, *np.cumsum(gain_R)])
    return Curve(
        cost_P=calls / num_queries,
        quality_P=weak_Q.mean() + gains / num_queries,
    )


def apgr(curve: Curve) -> float:
    """Average performance gap recovered: (∫ quality d share - weak) / (strong - weak).

    0.5 is a coin, 1 recovers the whole gap with no call to the strong model. NaN without a gap.
    """
    weak, strong = curve.quality_P[0], curve.quality_P[-1]
    if weak == strong:
        return float("nan")
    return float((np.trapezoid(curve.quality_P, curve.cost_P) - weak) / (strong - weak))


def cpt(curve: Curve, share: float) -> float:
    """Call-performance threshold: the least share of strong calls that recovers `share`."""
    weak, strong = curve.quality_P[0], curve.quality_P[-1]
    reached = curve.quality_P >= weak + share * (strong - weak)
    return float(curve.cost_P[reached.argmax()])


def trade_curve(quality_QM: Floats, scores_QM: Floats, cost_QM: Floats) -> Curve:
    """Return mean score against mean cost while the price of cost rises from nothing.

    At price λ every query goes to the model with the highest predicted quality - λ·cost.
    """
    scale = cost_QM.max() or 1.0
    points = set()
    for price in (0.0, *np.logspace(-4, 2, 60)):
        chosen_Q1 = (quality_QM - price * cost_QM / scale).argmax(1)[:, None]
        cost = np.take_along_axis(cost_QM, chosen_Q1, 1).mean()
        points.add((float(cost), float(np.take_along_axis(scores_QM, chosen_Q1, 1).mean())))
    costs, qualities = zip(*sorted(points), strict=True)
    return Curve(cost_P=np.array(costs), quality_P=np.array(qualities))


def aiq(curve: Curve, largest_cost: float) -> float:
    """Average improvement in quality: area under the non-decreasing convex hull over cost.

    The hull is level beyond the dearest point, up to `largest_cost`, by which the area is divided;
    it starts at the cheapest point (nothing is credited below it).
    """
    hull: list[tuple[float, float]] = []
    best = -np.inf
    for cost, quality in zip(curve.cost_P, curve.quality_P, strict=True):
        if quality <= best:
            continue
        best = quality
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], (cost, quality)):
            hull.pop()
        hull.append((float(cost), float(quality)))
    hull.append((max(largest_cost, hull[-1][0]), hull[-1][1]))
    costs, qualities = np.array(hull).T
    return float(np.trapezoid(qualities, costs) / largest_cost)


def bootstrap(metric: Callable[[NDArray[np.intp]], float], num_queries: int) -> tuple[float, float]:
    """Return the 95% percentile interval of `metric`, a function of resampled row numbers.

    Samples where it is NaN are left out.
    """
    rng = np.random.default_rng(0)
    values = [metric(rng.integers(num_queries, size=num_queries)) for _ in range(300)]
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def wilson_interval(total: float, count: int) -> tuple[float, float]:
    """Return the 95% interval, within [0, 1], of the mean of `count` scores from their sum.

    Of shares it is Wilson's (1927). For scores between the two ends it is too wide, never too
    narrow: their variance is at most mean · (1 - mean).
    """
    mean, z2 = total / count, _Z_95**2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    spread = math.sqrt(mean * (1 - mean) / count + z2 / (4 * count**2))
    half = _Z_95 * spread / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    run = right[0] - left[0]
    return (right[1] - left[1]) / run if run > 0 else float("inf")
