"""Plays a day with several strategies and compares them with the offline optimum."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.budget.replay.offline import offline_optimum
from policies.budget.replay.scene import Day, Scene, day_costs
from policies.budget.replay.strategies import (
    ByController,
    FixedPrice,
    Greedy,
    Strategy,
    Thinning,
    calibrate,
)
from policies.budget.targets import Target

OPTIMUM = "offline optimum"
CONTROLLER = "controller"


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one strategy did over a day.

    `spent_share` is its spending over the budget. `predicted_quality` is the mean prediction of the
    models it took, what every strategy maximises; `actual_quality` the mean of the real outcomes.
    `quality_share` is its predicted quality over the offline optimum's. Per hour: `spent_H`,
    `predicted_H` (sum), `quality_H` (actual, mean) and, for the controller, `price_H`.
    """

    name: str
    spent_share: float
    predicted_quality: float
    actual_quality: float
    quality_share: float
    actual_quality_share: float
    spent_H: NDArray[np.float64]
    predicted_H: NDArray[np.float64]
    quality_H: NDArray[np.float64]
    price_H: NDArray[np.float64] | None = None
    decision_p50_us: float | None = None


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """All strategies over one day. `requests_H` and `intensity_H` are the day's rhythm."""

    target: Target
    budget: float
    num_requests: int
    results: tuple[Result, ...]
    requests_H: NDArray[np.float64]
    intensity_H: NDArray[np.float64]

    def of(self, name: str) -> Result:
        """Return one strategy's result."""
        return next(result for result in self.results if result.name == name)


def replay_day(
    scene: Scene,
    day: Day,
    target: Target,
    *,
    yesterday: Day,
    learned: bool = True,
    seed: int = 0,
) -> Replayed:
    """Play `day` with every strategy.

    Static strategies are calibrated on `yesterday`; the controller has lived through it where
    `learned`, and starts cold otherwise. The target must be per hour.
    """
    resource = target.resource
    costs = day_costs(scene, day, resource)
    predicted = scene.predicted_QM[day.queries]
    actual = scene.actual_QM[day.queries]
    budget = target.budget(elapsed_s=86_400, num_requests=0)
    settings = calibrate(scene, yesterday, resource, budget=budget)

    judge = _Judge(day=day, costs=costs, predicted=predicted, actual=actual, budget=budget)
    optimum = offline_optimum(predicted, costs, day.available_NM, budget=budget)
    judge.best = judge.judge(OPTIMUM, optimum)

    controller = ByController(scene, target, announced=yesterday.grid)
    if learned:
        controller.begin(yesterday)
        _play(controller, day_costs(scene, yesterday, resource))
    controller.begin(day)
    shares, prices, seconds = _play(controller, costs)
    results = [
        judge.best,
        judge.judge(CONTROLLER, shares, prices=prices, decision_s=seconds),
    ]
    static: Mapping[str, Strategy] = {
        "fixed price": FixedPrice(scene, day, resource, settings.price),
        "greedy until exhausted": Greedy(scene, day, resource, budget_per_hour=budget / 24),
        "uniform thinning": Thinning(
            scene,
            day,
            resource,
            strong_share=settings.strong_share,
            rng=np.random.default_rng(seed),
        ),
    }
    results += [judge.judge(name, _play(one, costs)[0]) for name, one in static.items()]
    hours = judge.hours
    intensity = [day.grid.at(hour * 3600 + day.times_s[0] // 86400 * 86400) for hour in range(24)]
    return Replayed(
        target=target,
        budget=budget,
        num_requests=len(day),
        results=tuple(results),
        requests_H=np.bincount(hours, minlength=24).astype(np.float64),
        intensity_H=np.array([reading.gco2e_per_kwh for reading in intensity]),
    )


class _Judge:
    """Turns who answered what into a `Result`."""

    def __init__(
        self,
        *,
        day: Day,
        costs: NDArray[np.float64],
        predicted: NDArray[np.float64],
        actual: NDArray[np.float64],
        budget: float,
    ) -> None:
        self.hours = ((day.times_s % 86_400) // 3600).astype(int)
        self._costs, self._predicted, self._actual = costs, predicted, actual
        self._budget = budget
        self.best: Result | None = None

    def judge(
        self,
        name: str,
        shares: NDArray[np.float64],
        *,
        prices: NDArray[np.float64] | None = None,
        decision_s: NDArray[np.float64] | None = None,
    ) -> Result:
        spent = (shares * self._costs).sum(axis=1)
        predicted_N = (shares * self._predicted).sum(axis=1)
        predicted = float(predicted_N.mean())
        quality = (shares * self._actual).sum(axis=1)
        counts = np.maximum(np.bincount(self.hours, minlength=24), 1)
        return Result(
            name=name,
            spent_share=float(spent.sum()) / self._budget,
            predicted_quality=predicted,
            actual_quality=float(quality.mean()),
            quality_share=predicted / self.best.predicted_quality if self.best else 1.0,
            actual_quality_share=float(quality.mean()) / self.best.actual_quality
            if self.best
            else 1.0,
            spent_H=self._sums(spent),
            predicted_H=self._sums(predicted_N),
            quality_H=self._sums(quality) / counts,
            price_H=None if prices is None else self._sums(prices) / counts,
            decision_p50_us=None if decision_s is None else float(np.median(decision_s)) * 1e6,
        )

    def _sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self.hours, weights=values, minlength=24).astype(np.float64)


def _play(
    strategy: Strategy, costs: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the choices as shares [N, M], the price at each request, and seconds per choice."""
    shares = np.zeros_like(costs)
    prices = np.zeros(len(costs))
    seconds = np.zeros(len(costs))
    for index in range(len(costs)):
        start_s = time.thread_time()
        column = strategy.choose(index)
        seconds[index] = time.thread_time() - start_s
        shares[index, column] = 1.0
        strategy.observe(float(costs[index, column]))
        if isinstance(strategy, ByController):
            prices[index] = strategy.price
    return shares, prices, seconds
