"""Draws an experiment's confidence sequences over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO

from policies.experiments.analysis import Point
from policies.experiments.config import Experiment
from policies.experiments.metrics import METRICS
from policies.experiments.report import Report

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(experiment: Experiment, report: Report, paths: Mapping[str, Sequence[Point]]) -> bytes:
    """Return a PNG: the primary effect of each treatment in `paths` after every request."""
    # matplotlib costs half a second to import, and only those who plot should pay.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for colour, (treatment, path) in zip(_COLOURS, paths.items(), strict=False):
        shown = _legible(path)
        x = [point.num_requests for point in shown]
        axes.plot(x, [p.estimate for p in shown], color=colour, label=treatment, linewidth=1.8)
        axes.fill_between(
            x, [p.low for p in shown], [p.high for p in shown], color=colour, alpha=0.18
        )
    axes.axhline(0, color="black", linewidth=0.8)
    metric = METRICS[report.primary_metric]
    axes.set_xlabel("requests")
    unit = "" if metric.is_share else f" ({metric.unit})"
    axes.set_ylabel(f"{metric.name} minus {experiment.control_arm.name}'s{unit}")
    axes.set_title(f"{report.name}: {1 - report.alpha:.0%} confidence sequence", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(loc="best", frameon=False)
    figure.supxlabel(report.recommendation, fontsize=8, wrap=True)
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _legible(path: Sequence[Point]) -> list[Point]:
    """Leave out the first looks, whose intervals would dwarf all later ones."""
    widths = [point.high - point.low for point in path]
    final = widths[-1] if widths else math.inf
    kept = [point for point, width in zip(path, widths, strict=True) if width <= 8 * final]
    return [point for point in kept if math.isfinite(point.high)]
