"""Hands the ledger's rows on: as files, as a report and its plot; and removes old ones."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from policies.files import replacing, write_atomic
from policies.pages import new_figure, png
from router.ledger import Format, GroupBy, LedgerError, Unit
from router.ledger.database import Database
from router.ledger.feedback import rated_requests
from router.ledger.queries import ALWAYS, Period, Spend, requests, total
from router.ledger.schema import REQUESTS

_ROWS_PER_GROUP = 10_000
_NAMES = tuple(column.name for column in REQUESTS.columns)
_JSON_NAMES = {column.name for column in REQUESTS.columns if isinstance(column.type, sa.JSON)}

_LABELS: dict[Unit, str] = {
    "usd": "USD",
    "wh": "Wh",
    "joules": "J per output token",
    "gco2e": "gCO2e",
    "tokens": "tokens",
    "requests": "requests",
}
_COUNTS = ("requests", "answered", "failed", "prompt tokens", "output tokens")
_COSTS = ("USD", "Wh", "gCO2e", "mean s")
_JOULES = ("J", "J at least", "J at most", "idle J", "J/output token")
_MOST_SERIES = 9
_MOST_TICKS = 30


def export(database: Database, target: Path, *, format: Format, period: Period = ALWAYS) -> int:
    """Write the rows of `period`, in order of time, to `target`; return how many.

    Memory stays constant however many there are, and `target` appears (or is replaced) only once
    it is complete. Nested columns are JSON text in CSV and Parquet. "outcomes" are the answers
    that users scored, as routers learn from them (JSON Lines). Raises `PolicyError` where the
    folder is missing, `LedgerError` where Parquet is asked for without pyarrow.
    """
    source: Generator[dict[str, Any]] = (
        _scored(database, period) if format == "outcomes" else requests(database, period=period)
    )
    with replacing(target) as temporary, closing(source) as rows:
        return _WRITERS[format](temporary, rows)


def _scored(database: Database, period: Period) -> Generator[dict[str, Any]]:
    with closing(rated_requests(database, period=period, only_with_feedback=True)) as scored:
        for outcome in scored:
            if line := outcome.to_line():
                yield line


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=_NAMES)
        writer.writeheader()
        for row in rows:
            writer.writerow(_flat(row))
            num_rows += 1
    return num_rows


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    try:
        import pyarrow as pa  # noqa: PLC0415 (an extra)
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise LedgerError(
            "export: Parquet needs the package pyarrow: pip install 'shoal[parquet]'"
        ) from None
    schema = pa.schema([(column.name, _arrow_type(pa, column)) for column in REQUESTS.columns])
    num_rows = 0
    with pq.ParquetWriter(path, schema) as writer:
        for group in _groups(map(_flat, rows), _ROWS_PER_GROUP):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            num_rows += len(group)
    return num_rows


_WRITERS: dict[str, Callable[[Path, Iterable[dict[str, Any]]], int]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "jsonl": _write_jsonl,
    "outcomes": _write_jsonl,
}


def _arrow_type(pa: Any, column: sa.Column[Any]) -> object:  # noqa: ANN401 (an optional module)
    if isinstance(column.type, sa.Double):
        return pa.float64()
    if isinstance(column.type, sa.Boolean):
        return pa.bool_()
    if isinstance(column.type, sa.Integer):
        return pa.int64()
    return pa.string()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: json.dumps(value) if name in _JSON_NAMES and value is not None else value
        for name, value in row.items()
    }


def _groups(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while group := list(islice(iterator, size)):
        yield group


def report_lines(
    by: Sequence[GroupBy], rows: Sequence[Spend], *, unit: Unit = "usd"
) -> list[tuple[str, ...]]:
    """Return `rows` as a table's lines, its head first, totals last where there are several.

    In joules the lines say what is known of energy: its range, what was idle, and what a token that
    clients got took.
    """
    costs, cells = (_JOULES, _joules) if unit == "joules" else (_COSTS, _costs)
    lines = [
        (*by, *_COUNTS, *costs),
        *((*_names(by, row), *_counts(row), *cells(row)) for row in rows),
    ]
    if len(rows) > 1:
        names = ("total", *("" for _ in by[1:])) if by else ()
        lines.append((*names, *_counts(total(rows)), *cells(total(rows))))
    return lines


def plot(rows: Sequence[Spend], target: Path, *, unit: Unit, series: str) -> None:
    """Draw spend per day as stacked bars into `target` (PNG), written atomically.

    `rows` are `spend(by=("day", series))`. The nine largest series are named, the rest is "other".
    Joules per token do not add up: their bars stand side by side.
    """
    totals: dict[str, float] = defaultdict(float)
    for row in rows:
        totals[_name(series, row.group[1])] += _used(row, unit)
    named = sorted(totals, key=lambda name: -totals[name])[:_MOST_SERIES]
    found = [int(row.group[0] or 0) for row in rows]
    days = list(range(min(found), max(found) + 1, 86400)) if found else []
    heights = {name: dict.fromkeys(days, 0.0) for name in (*named, "other")}
    for row in rows:
        name = _name(series, row.group[1])
        if unit != "joules" or name in named:
            heights[name if name in named else "other"][int(row.group[0] or 0)] += _used(row, unit)

    figure, [axes] = new_figure(width=9)
    labels = [_day(day) for day in days]
    bottom = [0.0] * len(days)
    beside = unit == "joules"
    width = 0.8 / (max(1, len(named)) if beside else 1)
    for place, (name, by_day) in enumerate(heights.items()):
        bars = list(by_day.values())
        left = (place - (len(named) - 1) / 2) * width if beside else 0.0
        if name != "other" or any(bars):
            places = [day + left for day in range(len(days))]
            axes.bar(places, bars, width, bottom=bottom, label=name)
        if not beside:
            bottom = [low + bar for low, bar in zip(bottom, bars, strict=True)]
    axes.set_ylabel(_LABELS[unit] + ("" if beside else " per day (UTC)"))
    axes.set_ylim(bottom=0)
    every = max(1, math.ceil(len(days) / _MOST_TICKS))
    axes.set_xticks(range(0, len(days), every), labels[::every], rotation=45)
    # A single day is one bar among others, not the whole width.
    middle, half = (len(days) - 1) / 2, max(len(days), 7) / 2
    axes.set_xlim(middle - half, middle + half)
    axes.grid(visible=False, axis="x")
    if totals:
        # Beside the bars: looking for the emptiest corner takes long, and warns when it does.
        axes.legend(title=series, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    write_atomic(target, png(figure))


def _used(row: Spend, unit: Unit) -> float:
    if unit == "tokens":
        return row.prompt_tokens + row.output_tokens
    if unit == "joules":
        return row.joules_per_token or 0.0
    return float(row.num_requests if unit == "requests" else getattr(row, unit))


def _counts(row: Spend) -> tuple[str, ...]:
    counts = (row.num_requests, row.num_answered, row.num_failed)
    return tuple(f"{count:,}" for count in (*counts, row.prompt_tokens, row.output_tokens))


def _costs(row: Spend) -> tuple[str, ...]:
    return (
        *(f"{amount:.6g}" for amount in (row.usd, row.wh, row.gco2e)),
        f"{row.latency_s / row.num_requests:.3f}" if row.num_requests else "-",
    )


def _joules(row: Spend) -> tuple[str, ...]:
    used = (row.wh, row.wh_low, row.wh_high, row.idle_wh)
    per_token = row.joules_per_token
    return (
        *(f"{wh * 3600:.4g}" for wh in used),
        "-" if per_token is None else f"{per_token:.4g}",
    )


def _names(by: Sequence[GroupBy], row: Spend) -> tuple[str, ...]:
    return tuple(_name(name, part) for name, part in zip(by, row.group, strict=True))


def _name(by: str, part: str | int | None) -> str:
    if by == "day":
        return _day(int(part or 0))
    if by == "hour":
        return datetime.fromtimestamp(int(part or 0), UTC).strftime("%Y-%m-%d %H:00")
    return "-" if part is None else str(part)


def _day(start_s: int) -> str:
    return datetime.fromtimestamp(start_s, UTC).strftime("%Y-%m-%d")
