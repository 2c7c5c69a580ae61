"""The frontier bench's rows, a policy each, and their picture: accuracy against cost, and loss
against the number of members."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.cascade.answers import Floats
from policies.cascade.frontier import pareto

COLOURS = {
    "fixed": "tab:gray",
    "routed": "tab:orange",
    "fused": "tab:red",
    "best-of": "tab:purple",
    "cascade": "tab:blue",
    "cascade with fused stages": "tab:cyan",
    "cascade, fused last": "tab:brown",
    "oracle": "tab:green",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A policy on the held-out queries."""

    name: str
    kind: str  # fixed, routed, fused, best-of, cascade, oracle
    quality_Q: Floats
    usd_Q: Floats
    flops_Q: Floats

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return float(self.quality_Q.mean())

    @property
    def usd(self) -> float:
        """Mean US dollars per query."""
        return float(self.usd_Q.mean())


def pick(name: str, kind: str, rows: list[Row], choice_Q: Floats) -> Row:
    """Return the policy that follows row `choice_Q` on each query."""
    at = np.arange(len(choice_Q))

    def take(field: str) -> Floats:
        result: Floats = np.stack([getattr(row, field) for row in rows], axis=1)[at, choice_Q]
        return result

    return Row(
        name=name,
        kind=kind,
        quality_Q=take("quality_Q"),
        usd_Q=take("usd_Q"),
        flops_Q=take("flops_Q"),
    )


def thinned(chains: list[Row], num: int = 6) -> list[Row]:
    """Return about `num` of a frontier's points, spread over its length."""
    if len(chains) <= num:
        return chains
    return [chains[i] for i in np.linspace(0, len(chains) - 1, num).round().astype(int)]


def draw(
    rows: list[Row], loss_by_n: dict[str, list[float]], *, base: str, num: int, file: Path
) -> None:
    """Draw both to `file`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, losses = figure.subplots(1, 2, width_ratios=(2.3, 1))
    for kind, colour in COLOURS.items():
        its = [row for row in rows if row.kind == kind]
        if not its:
            continue
        cost = np.array([row.usd for row in its]) * 1e3
        accuracy = np.array([row.accuracy for row in its])
        if kind.startswith("cascade"):
            axes.plot(cost, accuracy, ".", color=colour, alpha=0.15, markersize=4)
            kept = pareto(cost, accuracy)
            axes.plot(cost[kept], accuracy[kept], "-", color=colour, label=kind)
            its, cost, accuracy = its[:1], cost[:1], accuracy[:1]
            axes.plot(cost, accuracy, "D", color=colour, markersize=8)
            continue
        marker = "*" if kind == "oracle" else "o"
        axes.plot(cost, accuracy, marker, color=colour, label=kind, markersize=8)
    _annotate(axes, [row for row in rows if not row.kind.startswith("cascade")])
    its = [row for row in rows if row.name == base]
    axes.axhline(its[0].accuracy, color="tab:gray", linewidth=0.8, linestyle="--")
    axes.axvline(its[0].usd * 400, color="tab:gray", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="US dollars per 1,000 queries (dotted: 40% of always-base)",
        ylabel="held-out accuracy (dashed: base)",
        title=f"Every policy on {num} held-out queries (◆: the budget's chain)",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center", fontsize=8)
    for (name, values), style in zip(list(loss_by_n.items())[1:], ("o-", "s--", "^:"), strict=True):
        losses.plot(loss_by_n["n"], values, style, label=name)
    losses.set(
        xlabel="members fused",
        ylabel="NLL of the right answer (nats)",
        title="Loss against n",
        xticks=loss_by_n["n"],
    )
    losses.grid(alpha=0.3)
    losses.legend(fontsize=8)
    figure.savefig(file, dpi=95)


def _annotate(axes: Any, rows: list[Row]) -> None:
    """Name the points, the names of points of about the same cost spread so as not to overlap."""
    low, high = min(row.accuracy for row in rows), max(row.accuracy for row in rows)
    dearest = max(row.usd for row in rows)
    least_gap = 0.032 * (high - low)
    placed: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row.accuracy):
        y = row.accuracy
        near = [other for cost, other in placed if abs(cost - row.usd) < 0.12 * dearest]
        if near and y < max(near) + least_gap:
            y = max(near) + least_gap
        placed.append((row.usd, y))
        axes.set_ylim(top=max(axes.get_ylim()[1], y + least_gap))
        # Names of the dear ones stand on the left, where there is room.
        dear = row.usd > 0.6 * dearest
        aside = (-0.015 if dear else 0.012) * dearest
        axes.annotate(
            row.name,
            (row.usd * 1e3, row.accuracy),
            xytext=((row.usd + aside) * 1e3, y),
            fontsize=7,
            ha="right" if dear else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "tab:gray"},
        )
