"""A report as a Markdown table, a reliability diagram as a PNG."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Final

from policies.evaluation.judge import Interval, Report, Result
from policies.files import write_atomic
from policies.pages import new_figure, png
from policies.routing.heads import Reliability
from policies.tables import markdown_table

_TITLE_CHARACTERS: Final = 40
"""So many fit across a reliability diagram."""


def table(report: Report) -> str:
    """Return the report as a Markdown table, one method per row."""
    two = len(report.models) == 2
    columns = ["accuracy", "cost / 1,000", "AIQ", "ECE", "µs/decision"]
    if two:
        columns = ["APGR, mean of folds", "APGR, pooled", "CPT(50)", "CPT(80)", *columns]
    overlap = f"; {report.overlap}" if report.overlap else ""
    lines = [
        f"**{report.title}** ({report.num_test:,} test queries{overlap})",
        "",
        markdown_table(
            [["method", *columns], *([row.method, *_cells(row, two)] for row in report.results)]
        ),
    ]
    return "\n".join([*lines, *_tasks(report)])


def _tasks(report: Report) -> list[str]:
    """Return the lines of a table of accuracies by task, and their mean over tasks."""
    if not report.by_task:
        return []
    methods = [row.method for row in report.results]
    rows = {task or "(no tag)": found for task, found in report.by_task.items()}
    mean = {name: sum(r[name] for r in rows.values()) / len(rows) for name in methods}
    cells = [
        [task, *(f"{found[name]:.4f}" for name in methods)]
        for task, found in {**rows, "mean over tasks": mean}.items()
    ]
    return ["", markdown_table([["task", *methods], *cells])]


def draw_reliability(diagram: Reliability, title: str, path: Path) -> None:
    """Draw predicted against observed scores."""
    figure, [axes] = new_figure(width=4, height=4)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.plot(diagram.predicted, diagram.observed, marker="o")
    axes.set_xlabel("predicted score")
    axes.set_ylabel("observed score")
    lines = [*wrap(title, _TITLE_CHARACTERS), f"ECE {diagram.ece:.3f}"]
    axes.set_title("\n".join(lines), fontsize="medium")
    write_atomic(path, png(figure))


def _cells(row: Result, two: bool) -> list[str]:
    cells = [
        f"{row.accuracy:.4f}{_interval(row.accuracy_interval)}",
        "–" if row.usd is None else f"{1000 * row.usd:.4g}",
        "–" if row.aiq is None else f"{row.aiq:.4f}",
        "–" if row.ece is None else f"{row.ece:.3f}",
        "–" if row.decision_us is None else f"{row.decision_us:.0f}",
    ]
    if not two:
        return cells
    # A constant prediction orders nothing: its thresholds are those of a coin.
    if row.apgr is None or row.method == "best single":
        return ["–", "–", "–", "–", *cells]
    folds = sorted(row.fold_apgrs)
    spread = f" ({folds[0]:.3f} to {folds[-1]:.3f})" if len(folds) > 1 else ""
    return [
        f"{sum(folds) / len(folds):.3f}{spread}",
        f"{row.apgr:.3f}{_interval(row.apgr_interval)}",
        f"{row.cpt50:.1%}",
        f"{row.cpt80:.1%}",
        *cells,
    ]


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
