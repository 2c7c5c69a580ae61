"""From a table of answers to a learned cascade, and what it is worth on answers it has not seen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from policies.cascade.answers import AnswerTable, Floats, Predictions, Rows, predict
from policies.cascade.fit import fit_scorer
from policies.cascade.frontier import Chain, StageColumn, StageTable, columns, pareto, search, thin
from policies.cascade.learned import (
    ROUTED,
    CascadePoint,
    LearnedCascade,
    check_top,
    within_budget,
)
from policies.cascade.scorer import LearnedScorer
from policies.errors import PolicyError
from policies.files import write_atomic
from policies.pages import new_figure, png
from policies.tables import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a chain did on each of Q queries: quality in [0, 1], and cost."""

    quality_Q: Floats
    cost_Q: Floats


@dataclass(frozen=True, kw_only=True)
class StopRate:
    """Of the answers that a stage's threshold accepts or rejects, how many are stopped early."""

    stage: str
    num_accepted: int
    num_false_stops: int
    num_rejected: int
    num_right_stops: int


def learn_cascade(
    table: AnswerTable,
    cost_QS: Floats,
    *,
    budget: float,
    routed: Sequence[str] = (),
    max_stages: int = 3,
    seed: int = 0,
    prior_power: float = 1.0,
    last: Collection[str] | None = None,
) -> LearnedCascade:
    """Fit the scorer, search every chain, and pick the best within `budget`.

    `cost_QS` and `budget` are US dollars per query. `routed` names the stages between which the
    query-dependent stage `ROUTED` chooses; fewer than two leave it out. `prior_power` sharpens the
    priors where they become a fusion's weights; `last` names the stages that a chain may end with
    (None: any). Raises `PolicyError` for a budget below the cheapest chain, or a name that the
    table lacks.
    """
    check_top(table.plans, table.top)
    for what, names in (("routed", routed), ("last", last or ())):
        for name in names:
            if name not in table.plans and not (what == "last" and name == ROUTED):
                raise PolicyError(
                    f"{what}: {name!r} is unknown; allowed are {', '.join(table.plans)}"
                )
    fitted = fit_scorer(table, seed=seed)
    view = _View(table, cost_QS, fitted.out_of_fold, tuple(routed) if len(routed) > 1 else ())
    frontier = search(
        view.stages,
        view.score,
        max_stages=max_stages,
        last=last,
    )
    point = within_budget(frontier, budget)
    # Only what lies before the chosen point may give way to it.
    at = frontier.index(point)
    frontier = (*thin(frontier[: at + 1], 0.005), *thin(frontier[at + 1 :], 0.005))
    return LearnedCascade(
        plans=table.plans,
        routed=view.routed,
        frontier=frontier,
        chosen=frontier.index(point),
        weights=fitted.weights,
        top=dict(table.top),
        prior_power=prior_power,
    )


def replay_cascade(
    cascade: LearnedCascade,
    table: AnswerTable,
    cost_QS: Floats,
    points: Sequence[CascadePoint] | None = None,
) -> list[Replay]:
    """Run points of the frontier (default: all) on the answers of `table`, e.g. held-out ones."""
    view = _View(table, cost_QS, predict(cascade.weights, table), cascade.routed)
    names = view.stages.names
    replays = []
    for point in cascade.frontier if points is None else points:
        chain = tuple(names.index(name) for name in point.stages)
        stages = columns(view.stages, view.score, chain, point.gates)
        replays.append(_run(stages, point.thresholds))
    return replays


def measure_stops(
    cascade: LearnedCascade, table: AnswerTable, point: CascadePoint | None = None
) -> list[StopRate]:
    """Return what stopping hopeless answers early does on the answers of `table`.

    One entry per stage but the last of `point` (default: the chosen one).
    """
    point = point or cascade.frontier[cascade.chosen]
    view = _View(table, np.zeros_like(table.quality_QS), predict(cascade.weights, table),
                 cascade.routed)  # fmt: skip
    chain = tuple(view.stages.names.index(name) for name in point.stages)
    stages = columns(view.stages, view.score, chain, point.gates)
    scorer = LearnedScorer(cascade.weights, cascade.plans, cascade.top)
    open_Q = np.ones(len(table.queries), dtype=bool)
    rates = []
    for j, threshold in enumerate(point.thresholds):
        ran_Q = open_Q & np.isfinite(stages[j].score_Q)
        accept_Q = ran_Q & (stages[j].score_Q >= threshold)
        stopped_Q = np.zeros_like(ran_Q)
        for q in np.flatnonzero(ran_Q):
            attempt = table.attempt(int(q), int(view.stages.model_QS[q, chain[j]]))
            stopped_Q[q] = scorer.ceiling(attempt, attempt.num_tokens) < threshold
        rates.append(
            StopRate(
                stage=point.stages[j],
                num_accepted=int(accept_Q.sum()),
                num_false_stops=int((accept_Q & stopped_Q).sum()),
                num_rejected=int((ran_Q & ~accept_Q).sum()),
                num_right_stops=int((ran_Q & ~accept_Q & stopped_Q).sum()),
            )
        )
        open_Q &= ~accept_Q
    return rates


class _View:
    """A table with the routed stage as one more column."""

    def __init__(
        self,
        table: AnswerTable,
        cost_QS: Floats,
        predictions: Predictions,
        routed: tuple[str, ...],
    ) -> None:
        self.routed = routed
        self._predictions = predictions
        names = tuple(table.plans)
        num_queries = len(table.queries)
        self._model_QS = np.tile(np.arange(len(names)), (num_queries, 1))
        if routed:
            among = np.array([names.index(name) for name in routed])
            choice_Q = among[predictions.prior_QS[:, among].argmax(axis=1)]
            self._model_QS = np.column_stack([self._model_QS, choice_Q])
            names = (*names, ROUTED)
        self.stages = StageTable(
            names=names,
            quality_QS=self._gather(table.quality_QS),
            cost_QS=self._gather(cost_QS),
            prior_QS=self._gather(predictions.prior_QS),
            model_QS=self._model_QS,
            answer_QS=np.take_along_axis(predictions.answer_QS, self._model_QS, axis=1),
        )

    def _gather(self, values_QS: Floats) -> Floats:
        return np.take_along_axis(values_QS, self._model_QS, axis=1)

    def score(self, stage: int, earlier: Chain, ran_QE: Rows) -> Floats:
        """Return the scores of a stage; a routed one's are those of the models it resolves to."""
        model_QS, predictions = self._model_QS, self._predictions
        return predictions.score_of(model_QS[:, stage], model_QS[:, list(earlier)], ran_QE)


def _run(stages: Sequence[StageColumn], thresholds: Sequence[float]) -> Replay:
    num_queries = stages[0].quality_Q.size
    open_Q = np.ones(num_queries, dtype=bool)
    quality_Q, cost_Q = np.zeros(num_queries), np.zeros(num_queries)
    for j, stage in enumerate(stages):
        cost_Q += np.where(open_Q, stage.cost_Q, 0.0)
        last = j == len(stages) - 1
        accept_Q = open_Q if last else open_Q & (stage.score_Q >= thresholds[j])
        quality_Q = np.where(accept_Q, stage.quality_Q, quality_Q)
        open_Q = open_Q & ~accept_Q
    return Replay(quality_Q=quality_Q, cost_Q=cost_Q)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Something's mean accuracy with its standard error, and mean cost in US dollars per query."""

    name: str
    accuracy: float
    error: float
    usd: float


@dataclass(frozen=True, kw_only=True)
class CascadeReport:
    """The frontier measured on held-out answers, next to every single stage and the oracle.

    `chains` has one entry per point of the frontier, in its order. The oracle takes, per query,
    the cheapest right answer, or the cheapest where none is right. `stops` says, of each stage but
    the last of the chosen chain, what stopping it early does.
    """

    points: tuple[CascadePoint, ...]
    chosen: int
    chains: tuple[Measured, ...]
    singles: tuple[Measured, ...]
    oracle: Measured
    num_queries: int
    stops: tuple[StopRate, ...] = ()


def report(cascade: LearnedCascade, table: AnswerTable, cost_QS: Floats) -> CascadeReport:
    """Measure every point of `cascade`'s frontier on the answers of `table`."""
    replays = replay_cascade(cascade, table, cost_QS)
    ranked_QS = np.where(table.quality_QS == table.quality_QS.max(axis=1, keepdims=True), 0, np.inf)
    best_Q1 = (ranked_QS + cost_QS).argmin(axis=1)[:, None]
    return CascadeReport(
        points=cascade.frontier,
        chosen=cascade.chosen,
        chains=tuple(
            measured(" -> ".join(point.stages), run.quality_Q, run.cost_Q)
            for point, run in zip(cascade.frontier, replays, strict=True)
        ),
        singles=tuple(
            measured(name, table.quality_QS[:, s], cost_QS[:, s])
            for s, name in enumerate(table.plans)
        ),
        oracle=measured(
            "oracle",
            np.take_along_axis(table.quality_QS, best_Q1, axis=1)[:, 0],
            np.take_along_axis(cost_QS, best_Q1, axis=1)[:, 0],
        ),
        num_queries=len(table.queries),
        stops=tuple(measure_stops(cascade, table)),
    )


def measured(name: str, quality_Q: Floats, cost_Q: Floats) -> Measured:
    """Return the means over queries, and the standard error of the accuracy."""
    deviation = float(quality_Q.std(ddof=1)) if quality_Q.size > 1 else 0.0
    return Measured(
        name=name,
        accuracy=float(quality_Q.mean()),
        error=deviation / quality_Q.size**0.5,
        usd=float(cost_Q.mean()),
    )


def render(report: CascadeReport) -> str:
    """Return the frontier as text, thinned to about a dozen rows, with 95% intervals."""
    dearest = max(single.usd for single in report.singles)
    picks = np.linspace(0, len(report.chains) - 1, min(12, len(report.chains)))
    shown = sorted({*picks.round().astype(int).tolist(), report.chosen})
    head = ("chain", "USD/1000", "of dearest", "accuracy", "learned")
    chains = [
        _cells(
            report.chains[index],
            dearest,
            mark="*" if index == report.chosen else "",
            learned=f"{report.points[index].accuracy:.1%}",
        )
        for index in shown
    ]
    others = [_cells(row, dearest) for row in (*report.singles, report.oracle)]
    lines = [
        f"Held out: {report.num_queries} queries.",
        text_table([head, *chains, [""] * len(head), *others]),
        "* the chain within the budget; ± is a 95% interval over queries.",
    ]
    lines += [
        f"Stopped early, of what {stop.stage} would have had rejected: {stop.num_right_stops} of "
        f"{stop.num_rejected}; accepted: {stop.num_false_stops} of {stop.num_accepted}."
        for stop in report.stops
    ]
    return "\n".join(lines)


def draw(report: CascadeReport, file: Path) -> None:
    """Draw the held-out frontier, the single stages and the oracle to a PNG."""
    figure, [axes] = new_figure()
    cost = np.array([row.usd for row in report.chains])
    accuracy = np.array([row.accuracy for row in report.chains])
    kept = pareto(cost, accuracy)
    axes.plot(cost * 1e3, accuracy, ".", color="tab:blue", alpha=0.25, label="learned chains")
    axes.plot(cost[kept] * 1e3, accuracy[kept], drawstyle="steps-post", color="tab:blue")
    chosen = report.chains[report.chosen]
    axes.errorbar(
        [chosen.usd * 1e3], [chosen.accuracy], yerr=[1.96 * chosen.error], fmt="D",
        color="tab:blue", label="within the budget",
    )  # fmt: skip
    _annotated(axes, report.singles, "o", "tab:gray", "one model")
    _annotated(axes, [report.oracle], "*", "tab:green", "per-query oracle")
    axes.set(
        xlabel="US dollars per 1,000 queries",
        ylabel="held-out accuracy",
        title=f"Cascades on {report.num_queries} held-out queries",
    )
    axes.legend(loc="lower right")
    write_atomic(file, png(figure))


def _annotated(axes: Axes, rows: Sequence[Measured], marker: str, color: str, label: str) -> None:
    costs = [row.usd * 1e3 for row in rows]
    axes.plot(costs, [row.accuracy for row in rows], marker, color=color, label=label)
    for row in rows:
        axes.annotate(
            row.name, (row.usd * 1e3, row.accuracy), textcoords="offset points", xytext=(5, 4),
            fontsize=8,
        )  # fmt: skip


def _cells(row: Measured, dearest: float, *, mark: str = "", learned: str = "") -> tuple[str, ...]:
    accuracy = f"{row.accuracy:.1%} ± {1.96 * row.error:.1%}"
    name = f"{mark} {row.name}".strip()
    share = f"{row.usd / dearest:.1%}" if dearest else "–"
    return name, f"{row.usd * 1e3:.4f}", share, accuracy, learned
