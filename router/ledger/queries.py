"""Sums over the ledger's rows, and the rows themselves as a stream."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from router.ledger.database import Database
from router.ledger.names import GroupBy
from router.ledger.schema import REQUESTS

_ROWS_PER_FETCH = 1000
_PERIOD_S = {"hour": 3600, "day": 86400}
_COLUMNS: dict[str, sa.Column[Any]] = {
    "key": REQUESTS.c.key_id,
    "members": REQUESTS.c.answered_by,
    **{name: REQUESTS.c[name] for name in ("model", "policy", "experiment", "arm", "endpoint")},
    "status": REQUESTS.c.status,
    "method": REQUESTS.c.energy_method,
}


@dataclass(frozen=True, kw_only=True)
class Period:
    """The rows with `since_s` <= time < `until_s`, in Unix seconds; None is open."""

    since_s: float | None = None
    until_s: float | None = None

    def holds(self) -> list[sa.ColumnElement[bool]]:
        """Return the conditions that a row's time must meet."""
        conditions: list[sa.ColumnElement[bool]] = []
        if self.since_s is not None:
            conditions.append(REQUESTS.c.time_s >= self.since_s)
        if self.until_s is not None:
            conditions.append(REQUESTS.c.time_s < self.until_s)
        return conditions


ALWAYS = Period()


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What the requests of one group used. `group` has one value per name that was asked for.

    A day or hour is the Unix time of its start (UTC). `num_answered` counts those that got an
    answer (status below 400), `num_failed` those that did not through the server's fault (5xx).
    """

    group: tuple[str | int | None, ...]
    num_requests: int
    num_answered: int
    num_failed: int
    prompt_tokens: int
    output_tokens: int
    usd: float
    wh: float
    gco2e: float
    latency_s: float


def sums(
    database: Database,
    *,
    by: Sequence[GroupBy] = (),
    period: Period = ALWAYS,
    where: Mapping[GroupBy, str | int] | None = None,
) -> list[Sums]:
    """Sum the rows of `period` that match `where`, one entry per group, largest spend first."""
    groups = [_grouping(name).label(f"group_{i}") for i, name in enumerate(by)]
    conditions = [_grouping(name) == value for name, value in (where or {}).items()]
    status = REQUESTS.c.status
    query = (
        sa.select(
            *groups,
            sa.func.count().label("num_requests"),
            _count(status < 400).label("num_answered"),
            _count(status >= 500).label("num_failed"),
            *(
                sa.func.coalesce(sa.func.sum(REQUESTS.c[name]), 0).label(name)
                for name in ("prompt_tokens", "output_tokens", "usd", "wh", "gco2e", "latency_s")
            ),
        )
        .where(*period.holds(), *conditions)
        .group_by(*groups)
        .order_by(sa.desc("usd"), sa.desc("num_requests"))
    )
    with database.connect() as connection:
        rows = connection.execute(query).mappings().all()
    return [
        Sums(
            group=tuple(_plain(row[f"group_{i}"]) for i in range(len(groups))),
            num_requests=int(row["num_requests"]),
            num_answered=int(row["num_answered"]),
            num_failed=int(row["num_failed"]),
            prompt_tokens=int(row["prompt_tokens"]),
            output_tokens=int(row["output_tokens"]),
            usd=float(row["usd"]),
            wh=float(row["wh"]),
            gco2e=float(row["gco2e"]),
            latency_s=float(row["latency_s"]),
        )
        for row in rows
        if row["num_requests"]
    ]


def stream(
    database: Database, query: sa.Select[Any], *, rows_per_fetch: int = _ROWS_PER_FETCH
) -> Generator[dict[str, Any]]:
    """Yield the rows of `query` without ever holding more than `rows_per_fetch` of them."""
    with database.connect() as connection:
        options = {"yield_per": rows_per_fetch}
        with connection.execute(query, execution_options=options) as result:
            for row in result.mappings():
                yield dict(row)


def requests(
    database: Database, *, period: Period = ALWAYS, experiment: str | None = None
) -> Generator[dict[str, Any]]:
    """Yield the rows of the table `requests` in order of time, all or one experiment's."""
    query = sa.select(REQUESTS).where(*period.holds()).order_by(REQUESTS.c.time_s)
    if experiment is not None:
        query = query.where(REQUESTS.c.experiment == experiment)
    return stream(database, query)


def _grouping(name: GroupBy) -> sa.ColumnElement[Any]:
    if name in _PERIOD_S:
        seconds = _PERIOD_S[name]
        return sa.cast(sa.func.floor(REQUESTS.c.time_s / seconds), sa.BigInteger) * seconds
    return _COLUMNS[name]


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(sa.case((condition, 1), else_=0)), 0)


def _plain(value: object) -> str | int | None:
    return value if value is None or isinstance(value, str) else int(str(value))
