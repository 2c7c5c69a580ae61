"""What was asked and spent over time, summed by the database: one row per bucket.

Rows of shadows are summed apart: no client asked for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import sqlalchemy as sa

from router.dashboard.windows import Window
from router.experiments.mirror import SHADOW_ENDPOINT
from router.ledger.schema import REQUESTS

_R = REQUESTS.c
_ANSWERED = _R.status < 400

_SUMMED: Mapping[str, sa.ColumnElement[Any]] = {
    "requests": sa.func.count(),
    "answered": sa.func.sum(sa.case((_ANSWERED, 1), else_=0)),
    "failed": sa.func.sum(sa.case((_R.status >= 500, 1), else_=0)),
    "prompt_tokens": sa.func.sum(_R.prompt_tokens),
    "output_tokens": sa.func.sum(_R.output_tokens),
    "usd": sa.func.sum(_R.usd),
    "wh": sa.func.sum(_R.wh),
    "gco2e": sa.func.sum(_R.gco2e),
    "latency_s": sa.func.sum(sa.case((_ANSWERED, _R.latency_s), else_=0.0)),
    "ttft_s": sa.func.sum(sa.case((_ANSWERED, _R.ttft_s), else_=0.0)),
    "num_ttft": sa.func.sum(sa.case((_ANSWERED & _R.ttft_s.is_not(None), 1), else_=0)),
}

Row: TypeAlias = Mapping[str, float]


def spending(connection: sa.Connection, window: Window, *, now_s: float) -> dict[str, Any]:
    """Return the totals of `window`, those of shadows, and a series of each figure.

    `latency_s` and `ttft_s` are means over answers, None where there are none; `failed` is the
    server's fault (5xx).
    """
    starts_s = window.starts_s(now_s)
    start = sa.cast(sa.func.floor(_R.time_s / window.bucket_s), sa.BigInteger) * window.bucket_s
    shadow = sa.case((_R.endpoint == SHADOW_ENDPOINT, 1), else_=0)
    query = (
        sa.select(
            start.label("start_s"),
            shadow.label("shadow"),
            *(column.label(name) for name, column in _SUMMED.items()),
        )
        .where(_R.time_s >= starts_s[0])
        .group_by("start_s", "shadow")
    )
    served: dict[int, Row] = {}
    shadows: list[Row] = []
    for row in connection.execute(query).mappings():
        sums = {name: float(row[name] or 0) for name in _SUMMED}
        if row["shadow"]:
            shadows.append(sums)
        else:
            served[int(row["start_s"])] = sums
    shadowed = _total(shadows)
    return {
        "totals": _with_means(_total(served.values())),
        "shadows": {name: shadowed[name] for name in ("requests", "usd", "wh", "gco2e")},
        "series": _series(starts_s, served),
    }


def _series(starts_s: list[int], rows: Mapping[int, Row]) -> dict[str, list[float | None]]:
    """Return a value per bucket; one without requests has spent nothing and took no time."""
    nothing = dict.fromkeys(_SUMMED, 0.0)
    found = [_with_means(rows.get(start_s, nothing)) for start_s in starts_s]
    return {"time_s": [*starts_s], **{name: [row[name] for row in found] for name in found[0]}}


def _total(rows: Iterable[Row]) -> dict[str, float]:
    total = dict.fromkeys(_SUMMED, 0.0)
    for row in rows:
        for name, value in row.items():
            total[name] += value
    return total


def _with_means(sums: Row) -> dict[str, float | None]:
    means = {
        "latency_s": _ratio(sums["latency_s"], sums["answered"]),
        "ttft_s": _ratio(sums["ttft_s"], sums["num_ttft"]),
    }
    return {**{name: value for name, value in sums.items() if name != "num_ttft"}, **means}


def _ratio(amount: float, number: float) -> float | None:
    return amount / number if number else None
