"""A learned cascade's frontier on answers it has not seen: figures, a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policies.cascade.answers import AnswerTable, Floats
from policies.cascade.frontier import pareto
from policies.cascade.learn import StopRate, measure_stops, replay_cascade
from policies.cascade.learned import CascadePoint, LearnedCascade
from policies.tables import text_table


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


def render(report: CascadeReport, *, max_rows: int = 12) -> str:
    """Return the frontier as text, thinned to about `max_rows`, with 95% intervals."""
    dearest = max(single.usd for single in report.singles)
    picks = np.linspace(0, len(report.chains) - 1, min(max_rows, len(report.chains)))
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - drawing only
    from matplotlib.figure import Figure  # noqa: PLC0415 - drawing only

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
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
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=110)


def _annotated(axes: object, rows: Sequence[Measured], marker: str, color: str, label: str) -> None:
    from matplotlib.axes import Axes  # noqa: PLC0415 - drawing only

    assert isinstance(axes, Axes)
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
    return name, f"{row.usd * 1e3:.4f}", f"{row.usd / dearest:.1%}", accuracy, learned
