"""Plays a day with several strategies, compares them with the offline optimum, draws the day."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import linprog

from policies.budget.prices import BudgetTarget, Resource
from policies.errors import LawError
from policies.tables import text_table
from tests.bench.replay.days import (
    Day,
    Scenario,
    Workload,
    adversarial,
    day_costs,
    ordinary,
    target_between,
)
from tests.bench.replay.strategies import (
    ByClock,
    ByController,
    FixedPrice,
    Greedy,
    Strategy,
    Thinning,
    calibrate,
)

OPTIMUM = "offline optimum"
CONTROLLER = "controller"

Rivals: TypeAlias = Callable[[Workload, Day, Day, BudgetTarget], Mapping[str, Strategy]]
"""Further strategies, by name, for a day, the day before it and a target."""


@dataclass(frozen=True, kw_only=True)
class StrategyResult:
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


@dataclass(frozen=True, kw_only=True)
class ReplayedDay:
    """All strategies over one day. `requests_H` and `intensity_H` are the day's rhythm."""

    target: BudgetTarget
    budget: float
    num_requests: int
    results: tuple[StrategyResult, ...]
    requests_H: NDArray[np.float64]
    intensity_H: NDArray[np.float64]

    def of(self, name: str) -> StrategyResult:
        """Return one strategy's result."""
        return next(result for result in self.results if result.name == name)


def replay_day(
    workload: Workload,
    day: Day,
    target: BudgetTarget,
    *,
    yesterday: Day,
    learned: bool = True,
    seed: int = 0,
    rivals: Rivals | None = None,
) -> ReplayedDay:
    """Play `day` with every strategy, and with the `rivals`.

    Static strategies are calibrated on `yesterday`; the controller has lived through it where
    `learned`, and starts cold otherwise. The target must be per hour.
    """
    resource = target.resource
    costs = day_costs(workload, day, resource)
    predicted = workload.predicted_QM[day.queries]
    actual = workload.actual_QM[day.queries]
    budget = target.budget(elapsed_s=86_400, num_requests=0)
    settings = calibrate(workload, yesterday, resource, budget=budget)

    judge = _Judge(day=day, costs=costs, predicted=predicted, actual=actual, budget=budget)
    optimum = offline_optimum(predicted, costs, day.available_NM, budget=budget)
    judge.best = judge.judge(OPTIMUM, optimum)

    controller = ByController(workload, target, announced=yesterday.grid)
    if learned:
        controller.begin(yesterday)
        _play(controller, day_costs(workload, yesterday, resource))
    controller.begin(day)
    shares, prices = _play(controller, costs)
    results = [
        judge.best,
        judge.judge(CONTROLLER, shares, prices=prices),
    ]
    static: Mapping[str, Strategy] = {
        "fixed price": FixedPrice(workload, day, resource, settings.price),
        "plain dual descent": ByClock(
            workload, day, resource, budget_per_hour=budget / 24, yesterday=yesterday
        ),
        "greedy until exhausted": Greedy(workload, day, resource, budget_per_hour=budget / 24),
        "uniform thinning": Thinning(
            workload,
            day,
            resource,
            strong_share=settings.strong_share,
            rng=np.random.default_rng(seed),
        ),
        **(rivals(workload, day, yesterday, target) if rivals else {}),
    }
    results += [judge.judge(name, _play(one, costs)[0]) for name, one in static.items()]
    hours = judge.hours
    intensity = [day.grid.at(hour * 3600 + day.times_s[0] // 86400 * 86400) for hour in range(24)]
    return ReplayedDay(
        target=target,
        budget=budget,
        num_requests=len(day),
        results=tuple(results),
        requests_H=np.bincount(hours, minlength=24).astype(np.float64),
        intensity_H=np.array([reading.gco2e_per_kwh for reading in intensity]),
    )


class _Judge:
    """Turns who answered what into a `StrategyResult`."""

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
        self.best: StrategyResult | None = None

    def judge(
        self,
        name: str,
        shares: NDArray[np.float64],
        *,
        prices: NDArray[np.float64] | None = None,
    ) -> StrategyResult:
        spent = (shares * self._costs).sum(axis=1)
        predicted_N = (shares * self._predicted).sum(axis=1)
        predicted = float(predicted_N.mean())
        quality = (shares * self._actual).sum(axis=1)
        counts = np.maximum(np.bincount(self.hours, minlength=24), 1)
        return StrategyResult(
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
        )

    def _sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self.hours, weights=values, minlength=24).astype(np.float64)


def _play(
    strategy: Strategy, costs: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the choices as shares [N, M], and the price at each request."""
    shares = np.zeros_like(costs)
    prices = np.zeros(len(costs))
    for index in range(len(costs)):
        column = strategy.choose(index)
        shares[index, column] = 1.0
        strategy.observe(float(costs[index, column]))
        if isinstance(strategy, ByController):
            prices[index] = strategy.price
    return shares, prices


def replay_scenarios(
    workload: Workload,
    *,
    resource: Resource,
    shares: Sequence[float],
    trouble_share: float | None,
    num_requests: int,
    mean_gco2e_per_kwh: float,
    seed: int,
    rivals: Rivals | None = None,
) -> Iterator[tuple[str, float, Scenario, ReplayedDay | None]]:
    """Replay an ordinary day at every target, then, where asked, the days that go wrong at one.

    Targets lie at `shares` of the way from the cheapest model for everybody to the best one. Yields
    what a day is called, its share, and what came of it; None where no assignment keeps the target.
    """
    traffic: dict[str, Any] = {
        "num_requests": num_requests,
        "mean_gco2e_per_kwh": mean_gco2e_per_kwh,
        "seed": seed,
    }
    usual = ordinary(workload, **traffic)
    days = [(usual, share) for share in shares]
    if trouble_share is not None:
        days += [(scenario, trouble_share) for scenario in adversarial(workload, **traffic)]
    for scenario, share in days:
        target = target_between(workload, usual.day, resource, share=share)
        title = f"{scenario.name}, target at {share:.0%}: {target.amount:.4g} {resource} per hour"
        try:
            replayed = replay_day(
                workload,
                scenario.day,
                target,
                yesterday=scenario.yesterday,
                learned=scenario.learned,
                seed=seed,
                rivals=rivals,
            )
        except LawError as error:
            yield f"{title}: {error}", share, scenario, None
        else:
            yield f"{title}, {replayed.num_requests} requests", share, scenario, replayed


def offline_optimum(
    qualities_NM: NDArray[np.float64],
    costs_NM: NDArray[np.float64],
    available_NM: NDArray[np.bool_],
    *,
    budget: float,
) -> NDArray[np.float64]:
    """Return [N, M] shares x that maximise Σ x·quality subject to Σ x·cost <= `budget`.

    Each request is answered once by a model that is up; shares may be fractional (at most one
    request is split, as there is one budget). HiGHS, sparse. Raises `LawError` where not even the
    cheapest models keep the budget.
    """
    num_requests, num_models = qualities_NM.shape
    rows = np.repeat(np.arange(num_requests), num_models)
    once = sp.csr_matrix(
        (np.ones(rows.size), (rows, np.arange(rows.size))), shape=(num_requests, rows.size)
    )
    # SciPy's stubs know no sparse constraints.
    solve: Any = linprog
    solution = solve(
        c=-qualities_NM.ravel(),
        # In units of the budget, so that the solver's tolerances mean something.
        A_ub=sp.csr_matrix(costs_NM.ravel()[None, :] / budget),
        b_ub=[1.0],
        A_eq=once,
        b_eq=np.ones(num_requests),
        bounds=np.stack([np.zeros(rows.size), available_NM.ravel().astype(np.float64)], axis=1),
        method="highs",
    )
    if solution.status != 0:
        raise LawError(f"no assignment keeps the budget {budget:g}: {solution.message}")
    return np.asarray(solution.x, dtype=np.float64).reshape(num_requests, num_models)


def table_of(replayed: ReplayedDay) -> str:
    """Return the results as text; quality is the predicted one, which all of them maximise."""
    head = ("strategy", "spent", "quality", "of optimum", "actual", "of optimum")
    rows = [
        (
            result.name,
            f"{result.spent_share:.2%}",
            f"{result.predicted_quality:.4f}",
            f"{result.quality_share:.2%}",
            f"{result.actual_quality:.4f}",
            f"{result.actual_quality_share:.2%}",
        )
        for result in replayed.results
    ]
    return text_table([head, *rows])


def draw(replayed: ReplayedDay, file: Path) -> None:
    """Write a PNG with four panels to `file`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    traffic, spending, price, quality = figure.subplots(4, 1, sharex=True)
    hours = np.arange(24)

    traffic.bar(hours, replayed.requests_H, color="lightgrey")
    traffic.set(ylabel="requests per hour")
    grid = traffic.twinx()
    grid.step(hours, replayed.intensity_H, where="mid", color="tab:brown")
    grid.set_ylabel("grid, gCO2e/kWh", color="tab:brown")

    unit = replayed.target.resource
    for result in replayed.results:
        spending.plot(
            hours,
            result.spent_H.cumsum() / replayed.budget,
            label=result.name,
            linestyle="--" if result.name == OPTIMUM else "-",
            linewidth=2 if result.name == CONTROLLER else 1,
        )
    spending.axhline(1, color="black", linewidth=0.8)
    spending.set(ylabel=f"{unit} spent / day's budget")
    spending.legend(fontsize=8)

    prices = replayed.of(CONTROLLER).price_H
    assert prices is not None
    price.step(hours, prices, where="mid", color="tab:orange")
    price.set(ylabel=f"controller's price\n(quality per {unit})", ylim=(0, None))

    for result in replayed.results:
        if result.name in (OPTIMUM, CONTROLLER):
            quality.plot(
                hours,
                result.quality_H,
                label=result.name,
                linestyle="--" if result.name == OPTIMUM else "-",
            )
    quality.set(ylabel="actual quality", xlabel="hour of the day (UTC)")
    quality.legend(fontsize=8)
    figure.savefig(file, dpi=120)
