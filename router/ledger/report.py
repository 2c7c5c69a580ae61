"""Spend by day, model, policy or key: a table for a terminal and a plot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from policies.files import replacing
from router.ledger.names import GroupBy, Unit
from router.ledger.queries import Sums

_LABELS: dict[str, str] = {
    "usd": "USD",
    "wh": "Wh",
    "gco2e": "gCO2e",
    "tokens": "tokens",
    "requests": "requests",
}
_HEADER = (
    *("requests", "answered", "failed", "prompt tokens", "output tokens"),
    *("USD", "Wh", "gCO2e", "mean s"),
)
_MOST_SERIES = 9
_MOST_TICKS = 30


def table(by: Sequence[GroupBy], rows: Sequence[Sums]) -> str:
    """Return `rows` as an aligned text table with a line of totals where there are several."""
    lines = [(*by, *_HEADER)]
    lines += [(*_names(by, row), *_cells(row)) for row in rows]
    if len(rows) > 1:
        total = Sums(
            group=(),
            **{name: sum(getattr(row, name) for row in rows) for name in _SUMMED},
        )
        names = ("total", *("" for _ in by[1:])) if by else ()
        lines.append((*names, *_cells(total)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i < len(by) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def plot(rows: Sequence[Sums], target: Path, *, unit: Unit, series: str) -> None:
    """Draw spend per day as stacked bars into `target` (PNG), written atomically.

    `rows` are `sums(by=("day", series))`. The nine largest series are named, the rest is "other".
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow to import)

    totals: dict[str, float] = defaultdict(float)
    for row in rows:
        totals[_name(series, row.group[1])] += value(row, unit)
    named = sorted(totals, key=lambda name: -totals[name])[:_MOST_SERIES]
    found = [int(row.group[0] or 0) for row in rows]
    days = list(range(min(found), max(found) + 1, 86400)) if found else []
    heights = {name: dict.fromkeys(days, 0.0) for name in (*named, "other")}
    for row in rows:
        name = _name(series, row.group[1])
        heights[name if name in named else "other"][int(row.group[0] or 0)] += value(row, unit)

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    labels = [_day(day) for day in days]
    bottom = [0.0] * len(days)
    for name, by_day in heights.items():
        bars = list(by_day.values())
        if name != "other" or any(bars):
            axes.bar(range(len(days)), bars, bottom=bottom, label=name)
        bottom = [low + bar for low, bar in zip(bottom, bars, strict=True)]
    axes.set_ylabel(f"{_LABELS[unit]} per day (UTC)")
    axes.set_ylim(bottom=0)
    every = max(1, math.ceil(len(days) / _MOST_TICKS))
    axes.set_xticks(range(0, len(days), every), labels[::every], rotation=45)
    # A single day is one bar among others, not the whole width.
    middle, half = (len(days) - 1) / 2, max(len(days), 7) / 2
    axes.set_xlim(middle - half, middle + half)
    axes.grid(axis="y", alpha=0.3)
    if totals:
        # Beside the bars: looking for the emptiest corner takes long, and warns when it does.
        axes.legend(title=series, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def value(row: Sums, unit: Unit) -> float:
    """Return what `row` used of `unit`."""
    if unit == "tokens":
        return row.prompt_tokens + row.output_tokens
    return float(row.num_requests if unit == "requests" else getattr(row, unit))


_SUMMED = (
    *("num_requests", "num_answered", "num_failed", "prompt_tokens", "output_tokens"),
    *("usd", "wh", "gco2e", "latency_s"),
)


def _cells(row: Sums) -> tuple[str, ...]:
    return (
        *(f"{getattr(row, name):,}" for name in _SUMMED[:5]),
        *(f"{amount:.6g}" for amount in (row.usd, row.wh, row.gco2e)),
        f"{row.latency_s / row.num_requests:.3f}" if row.num_requests else "-",
    )


def _names(by: Sequence[GroupBy], row: Sums) -> tuple[str, ...]:
    return tuple(_name(name, part) for name, part in zip(by, row.group, strict=True))


def _name(by: str, part: str | int | None) -> str:
    if by == "day":
        return _day(int(part or 0))
    if by == "hour":
        return datetime.fromtimestamp(int(part or 0), UTC).strftime("%Y-%m-%d %H:00")
    return "-" if part is None else str(part)


def _day(start_s: int) -> str:
    return datetime.fromtimestamp(start_s, UTC).strftime("%Y-%m-%d")
