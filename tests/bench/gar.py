"""GAR beside the budget controller: the same days, the same outcomes, the same predictions.

    python -m tests.bench.gar [pool] [llmrouter] [--seeds N ...]

GAR (arXiv 2605.11603) minimises a request's carbon under floors on accuracy; GAR-PD prices a
rolling carbon budget by primal-dual steps. Both are written from the paper's abstract, which names
the parts and not their sizes; floors are tuned per data set as it says, here on the day before, and
its floor on latency is left out, since the data has no latencies. Neither knows a forecast.

- **floor**: the cheapest model whose predicted accuracy reaches the floor, else the most accurate.
  The floor is the highest with which the day before would have kept the budget.
- **GAR-PD**: of the models that reach nine tenths of that floor, the one with the largest predicted
  accuracy less price times carbon. After each request λ <- max(0, λ + step · (carbon - due)), where
  `due` is what the budget allows per request in the mean of the last 200 and the step is such that
  200 requests at twice the budget raise the price by its usual size.
"""

from __future__ import annotations

import argparse
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.budget.prices import BudgetTarget
from tests.bench.budget_replay import QUALITY, WITHIN, WORKLOADS, replays, rows_of
from tests.bench.replay.days import Day, Workload, day_costs
from tests.bench.replay.replay import CONTROLLER
from tests.bench.replay.strategies import Strategy, calibrate

SEEDS = (801, 802, 803, 804, 805)
COMPARED = (CONTROLLER, "plain dual descent", "GAR, floor", "GAR-PD")
_WINDOW = 200
_SLACK = 0.9


def cheapest_above(
    scores_NM: NDArray[np.float64], costs_NM: NDArray[np.float64], floor: float
) -> NDArray[np.int_]:
    """Return each request's cheapest model that reaches `floor`, else its best one."""
    reaches = scores_NM >= floor
    cheapest: NDArray[np.int_] = np.where(reaches, costs_NM, np.inf).argmin(axis=1)
    return np.where(reaches.any(axis=1), cheapest, scores_NM.argmax(axis=1))


class Floor:
    """The cheapest model that reaches a floor that kept the budget on the day before."""

    def __init__(self, workload: Workload, day: Day, yesterday: Day, target: BudgetTarget) -> None:
        resource, budget = target.resource, target.budget(elapsed_s=86_400, num_requests=0)
        before = workload.predicted_QM[yesterday.queries]
        estimates = day_costs(workload, yesterday, resource, estimated=True)
        costs, rows = day_costs(workload, yesterday, resource), np.arange(len(yesterday))
        low, high = 0.0, 1.0
        for _ in range(40):
            self.floor = (low + high) / 2
            spent = costs[rows, cheapest_above(before, estimates, self.floor)].sum()
            low, high = (self.floor, high) if spent <= budget else (low, self.floor)
        self.scores = np.where(day.available_NM, workload.predicted_QM[day.queries], -np.inf)
        self.estimates = day_costs(workload, day, resource, estimated=True)
        self._columns = cheapest_above(
            self.scores, np.where(day.available_NM, self.estimates, np.inf), self.floor
        )

    def choose(self, index: int) -> int:
        """Take the cheapest that is good enough."""
        return int(self._columns[index])

    def observe(self, cost: float) -> None:
        """Learn nothing."""


class PrimalDual(Floor):
    """GAR-PD: a price for carbon that moves with every request, among models above the floor."""

    def __init__(self, workload: Workload, day: Day, yesterday: Day, target: BudgetTarget) -> None:
        super().__init__(workload, day, yesterday, target)
        budget = target.budget(elapsed_s=86_400, num_requests=0)
        self._price = calibrate(workload, yesterday, target.resource, budget=budget).price
        self._due = budget / len(yesterday)
        self._step = self._price / (_WINDOW * self._due)
        self._spent: deque[float] = deque(maxlen=_WINDOW)

    def choose(self, index: int) -> int:
        """Pay the price among the models that are good enough."""
        scores = self.scores[index]
        value = scores - self._price * self.estimates[index]
        reaches = scores >= _SLACK * self.floor
        return int(np.where(reaches, value, -np.inf).argmax() if reaches.any() else scores.argmax())

    def observe(self, cost: float) -> None:
        """Move the price by what the last requests cost beyond their share."""
        self._spent.append(cost)
        over = float(np.mean(self._spent)) - self._due
        self._price = max(0.0, self._price + self._step * over)


def rivals(
    workload: Workload, day: Day, yesterday: Day, target: BudgetTarget
) -> Mapping[str, Strategy]:
    """Return both of GAR's strategies for a day."""
    return {
        "GAR, floor": Floor(workload, day, yesterday, target),
        "GAR-PD": PrimalDual(workload, day, yesterday, target),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return, per kind of day, how each strategy did, as Markdown."""
    lines = [
        "| days | strategy | both aims met | mean miss of the target (worst) | spent: least, most "
        "| mean quality of the optimum's |",
        "|---|---|---|---|---|---|",
    ]
    kinds: dict[tuple[bool, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["scenario"] == "ordinary day", row["strategy"]].append(row)
    for ordinary in (True, False):
        for name in COMPARED:
            days = kinds[ordinary, name]
            spent = np.array([day["spent_share"] for day in days])
            quality = np.array([day["quality_share"] for day in days])
            miss = np.abs(spent - 1)
            met = int(((miss <= WITHIN) & (quality >= QUALITY)).sum())
            lines.append(
                f"| {'ordinary' if ordinary else 'hard'} | {name} | {met} of {len(days)} | "
                f"{miss.mean():.2%} ({miss.max():.1%}) | {spent.min():.1%}, {spent.max():.1%} | "
                f"{quality.mean():.2%} |"
            )
    return "\n".join(lines)


def main(names: Sequence[str], *, seeds: Sequence[int]) -> None:
    """Replay the days, print each, and the table."""
    rows: list[dict[str, Any]] = []
    for name in names:
        for seed in seeds:
            workload = WORKLOADS[name](seed)
            for title, share, scenario, replayed in replays(workload, seed, rivals):
                assert replayed is not None
                found = rows_of(name, seed, scenario, share, replayed)
                found = [row for row in found if row["strategy"] in COMPARED]
                rows += found
                told = ", ".join(
                    f"{row['strategy']} {row['spent_share']:.1%} {row['quality_share']:.1%}"
                    for row in found
                )
                print(f"{name} {seed} {title}: {told}", flush=True)
    print(summary(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    main(given.names or list(WORKLOADS), seeds=given.seeds)
