"""Who decides in a replay: the controller, and the simpler ways it has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from policies.base import Decision, Query
from policies.budget.controller import Controller
from policies.budget.prices import BudgetTarget, Resource
from policies.carbon.grid import GridIntensity, GridReading
from policies.carbon.settings import LiveModels
from policies.footprint import Footprint
from policies.plan import Answer, members
from tests.bench.replay.days import Day, Workload, day_costs


class Strategy(Protocol):
    """Chooses a model for each request of a day, in order, and hears what each cost."""

    def choose(self, index: int) -> int:
        """Return the column of the model that answers request `index`."""
        ...

    def observe(self, cost: float) -> None:
        """Hear what the last request cost in the target's resource."""
        ...


class ByController:
    """The budget controller over a policy that takes the best predicted model.

    It knows predictions, estimates, the clock and what is `announced` of the grid; not the answers'
    lengths nor the traffic to come. `begin` moves it to another day; what it learned stays.
    """

    def __init__(
        self,
        workload: Workload,
        target: BudgetTarget,
        *,
        announced: GridIntensity,
    ) -> None:
        self._workload = workload
        self._resource = target.resource
        self._names = workload.names
        self._grid = _TodaysGrid(announced)
        self._now_s = 0.0
        self._day: Day | None = None
        self._last: tuple[Query, Decision] | None = None
        self._target = target
        self._controller: Controller | None = None

    def begin(self, day: Day) -> None:
        """Go on with `day`."""
        self._day = day
        self._grid.today = day.grid
        self._now_s = float(day.times_s[0])
        if self._controller is None:
            self._controller = Controller(
                models=LiveModels(
                    self._workload.models,
                    engine_of=dict.fromkeys(self._names, ""),
                    settings=self._workload.carbon,
                    grid=self._grid,
                    clock=self._clock,
                ),
                clock=self._clock,
                announced=self._grid.announced,
                targets=(self._target,),
            )

    @property
    def controller(self) -> Controller:
        """The controller; there is one once a day has begun."""
        assert self._controller is not None
        return self._controller

    @property
    def price(self) -> float:
        """The current price of the target's resource."""
        return self.controller.prices()[self._resource]

    def prepare(self, index: int) -> tuple[Query, Decision]:
        """Return what the router hands to the controller for request `index`."""
        assert self._day is not None
        day = self._day
        self._now_s = float(day.times_s[index])
        query = int(day.queries[index])
        available = day.available_NM[index]
        predicted = self._workload.predicted_QM[query]
        scores = {
            name: float(predicted[column])
            for column, name in enumerate(self._names)
            if available[column]
        }
        best = max(scores, key=lambda name: scores[name])
        return (
            Query(
                text="", prompt_tokens=int(self._workload.prompt_tokens_Q[query]), max_tokens=4096
            ),
            Decision(plan=Answer(members=(best,)), scores=scores),
        )

    def choose(self, index: int) -> int:
        """Ask the controller."""
        query, decision = self.prepare(index)
        decision = self.controller.choose(query, decision)
        self._last = (query, decision)
        [name] = members(decision.plan)
        return self._names.index(name)

    def observe(self, cost: float) -> None:
        """Settle the last request."""
        assert self._last is not None
        self.controller.observe(*self._last, _footprint(self._resource, cost))

    def _clock(self) -> float:
        return self._now_s


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What the static strategies were given the day before, when the budget was met exactly.

    `price` is the one price that would have met it; `strong_share` the share of requests that could
    have gone to the best predicted model, the others to the cheapest.
    """

    price: float
    strong_share: float


def calibrate(
    workload: Workload, yesterday: Day, resource: Resource, *, budget: float
) -> Calibrated:
    """Return the settings with which static strategies would have met `budget` yesterday."""
    scores, estimates, costs = _views(workload, yesterday, resource)
    rows = np.arange(len(yesterday))

    def spend(columns: NDArray[np.int_]) -> float:
        return float(costs[rows, columns].sum())

    low, high = 1e-4 / float(estimates.max()), 1e4 / float(estimates.min())
    for _ in range(60):
        price = float(np.sqrt(low * high))
        if spend(np.argmax(scores - price * estimates, axis=1)) > budget:
            low = price
        else:
            high = price
    strong = spend(np.argmax(scores, axis=1))
    weak = spend(_cheapest(estimates, yesterday))
    share = (budget - weak) / (strong - weak)
    return Calibrated(price=high, strong_share=float(np.clip(share, 0.0, 1.0)))


class FixedPrice:
    """Static thresholds: one price for all time, calibrated on the day before."""

    def __init__(self, workload: Workload, day: Day, resource: Resource, price: float) -> None:
        scores, estimates, _ = _views(workload, day, resource)
        self._best = np.argmax(scores - price * estimates, axis=1)

    def choose(self, index: int) -> int:
        """Take what the price picks."""
        return int(self._best[index])

    def observe(self, cost: float) -> None:
        """Learn nothing."""


class ByClock:
    """Plain dual descent: λ += step · (spent - target), by the clock, with nothing forecast.

    The step is such that overspending by an hour's budget raises the price by what the best models
    are better than the cheapest ones, per what they cost more, in the mean of the day before.
    """

    def __init__(
        self,
        workload: Workload,
        day: Day,
        resource: Resource,
        *,
        budget_per_hour: float,
        yesterday: Day,
    ) -> None:
        self._scores, self._estimates, _ = _views(workload, day, resource)
        self._times_s = day.times_s
        self._budget_per_s = budget_per_hour / 3600
        scores, estimates, _ = _views(workload, yesterday, resource)
        rows, best = np.arange(len(yesterday)), np.argmax(scores, axis=1)
        cheapest = _cheapest(estimates, yesterday)
        gain = (scores[rows, best] - scores[rows, cheapest]).mean()
        more = (estimates[rows, best] - estimates[rows, cheapest]).mean()
        self._step = float(gain / more) / budget_per_hour
        self._price = float(gain / more)
        self._spent = 0.0
        self._last_s = float(day.times_s[0])

    def choose(self, index: int) -> int:
        """Pay the price that the time since the last request left."""
        now_s = float(self._times_s[index])
        due = self._budget_per_s * (now_s - self._last_s)
        self._price = max(0.0, self._price + self._step * (self._spent - due))
        self._last_s, self._spent = now_s, 0.0
        return int(np.argmax(self._scores[index] - self._price * self._estimates[index]))

    def observe(self, cost: float) -> None:
        """Remember the cost until the next request."""
        self._spent = cost


class Greedy:
    """The best predicted model until the hour's budget is spent, then the cheapest one."""

    def __init__(
        self, workload: Workload, day: Day, resource: Resource, *, budget_per_hour: float
    ) -> None:
        scores, estimates, _ = _views(workload, day, resource)
        self._best = np.argmax(scores, axis=1)
        self._cheapest = _cheapest(estimates, day)
        self._hours = (day.times_s // 3600).astype(int)
        self._budget = budget_per_hour
        self._hour = -1
        self._spent = 0.0

    def choose(self, index: int) -> int:
        """Take the best while the hour's budget lasts."""
        if self._hours[index] != self._hour:
            self._hour = int(self._hours[index])
            self._spent = 0.0
        exhausted = self._spent >= self._budget
        return int((self._cheapest if exhausted else self._best)[index])

    def observe(self, cost: float) -> None:
        """Add up the hour."""
        self._spent += cost


class Thinning:
    """A coin decides: the best predicted model for a share of the requests, else the cheapest."""

    def __init__(
        self,
        workload: Workload,
        day: Day,
        resource: Resource,
        *,
        strong_share: float,
        rng: np.random.Generator,
    ) -> None:
        scores, estimates, _ = _views(workload, day, resource)
        strong = rng.random(len(day)) < strong_share
        self._columns = np.where(strong, np.argmax(scores, axis=1), _cheapest(estimates, day))

    def choose(self, index: int) -> int:
        """Take what the coin said."""
        return int(self._columns[index])

    def observe(self, cost: float) -> None:
        """Learn nothing."""


class _TodaysGrid:
    """The grid of whichever day is being played; what was announced of it may be wrong."""

    today: GridIntensity

    def __init__(self, announced: GridIntensity) -> None:
        self._announced = announced

    def at(self, now_s: float) -> GridReading:
        """Return the reading."""
        return self.today.at(now_s)

    def announced(self, then_s: float) -> float | None:
        """Return what was announced."""
        return self._announced.announced(then_s)


def _views(
    workload: Workload, day: Day, resource: Resource
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return [N, M] predicted scores (-inf where down), estimated costs and real costs."""
    scores = np.where(day.available_NM, workload.predicted_QM[day.queries], -np.inf)
    return (
        scores,
        day_costs(workload, day, resource, estimated=True),
        day_costs(workload, day, resource),
    )


def _cheapest(estimates: NDArray[np.float64], day: Day) -> NDArray[np.int_]:
    cheapest: NDArray[np.int_] = np.argmin(np.where(day.available_NM, estimates, np.inf), axis=1)
    return cheapest


def _footprint(resource: Resource, cost: float) -> Footprint:
    if resource == "usd":
        return Footprint(usd=cost)
    return Footprint(wh=cost) if resource == "wh" else Footprint(gco2e=cost)
