"""What requests cost, summed, and the rows themselves as a stream."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import sqlalchemy as sa

from policies.footprint import AMOUNTS, Cost, joined
from router.ledger import GroupBy
from router.ledger.database import Database
from router.ledger.schema import FEEDBACK, REQUESTS
from router.record import SHADOW

_ROWS_PER_FETCH = 1000
_PERIOD_S = {"hour": 3600, "day": 86400}
_R = REQUESTS.c
_GROUPS: dict[str, sa.ColumnElement[Any]] = {
    "key": _R.key_id,
    "team": _R.team_id,
    "members": _R.answered_by,
    "method": _R.energy_method,
    **{
        name: _R[name]
        for name in ("price", "model", "policy", "experiment", "arm", "endpoint", "status")
    },
}

Condition: TypeAlias = sa.ColumnElement[bool]

ANSWERED: Condition = _R.status < 400
# What a client asked for; a shadow's rows nobody did.
SERVED: Condition = _R.endpoint != SHADOW


@dataclass(frozen=True, kw_only=True)
class Period:
    """The rows with `since_s` <= time < `until_s`, in Unix seconds; None is open."""

    since_s: float | None = None
    until_s: float | None = None

    def holds(self) -> list[Condition]:
        """Return the conditions that a row's time must meet."""
        conditions: list[Condition] = []
        if self.since_s is not None:
            conditions.append(_R.time_s >= self.since_s)
        if self.until_s is not None:
            conditions.append(_R.time_s < self.until_s)
        return conditions


ALWAYS = Period()


@dataclass(frozen=True, kw_only=True)
class Spend(Cost):
    """What the requests of one group used, in sums.

    `group` has one value per name or expression that was asked for; a day or hour is the Unix time
    of its start (UTC). `num_answered` counts those that got an answer (status below 400),
    `num_failed` those that did not through the server's fault (5xx). `latency_s` is over all,
    `answered_s` and `ttft_s` over answers, `num_ttft` of which have a time to first text. `score`
    is the sum of users' scores of `num_rated` answers, where ratings were asked for. The first
    request came at Unix time `first_s`.
    """

    group: tuple[str | int | None, ...] = ()
    num_requests: int = 0
    num_answered: int = 0
    num_failed: int = 0
    num_ttft: int = 0
    num_rated: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    latency_s: float = 0.0
    answered_s: float = 0.0
    ttft_s: float = 0.0
    score: float = 0.0
    first_s: float = 0.0

    @property
    def joules_per_token(self) -> float | None:
        """Joules per token that clients got; None where they got none."""
        return self.wh * 3600 / self.output_tokens if self.output_tokens else None


@dataclass(frozen=True, kw_only=True)
class Use(Cost):
    """What a member used, in sums: its cost, and tokens.

    The requests came from Unix time `first_s` to `last_s`.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    first_s: float = math.inf
    last_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.output_tokens

    @classmethod
    def together(cls, uses: Iterable[Use]) -> Use:
        """Return several uses as one."""
        every = list(uses)
        sums: dict[str, Any] = {
            name: sum(getattr(use, name) for use in every)
            for name in ("prompt_tokens", "output_tokens", *AMOUNTS)
        }
        return cls(
            **sums,
            method=joined(use.method for use in every),
            price=joined(use.price for use in every),
            first_s=min((use.first_s for use in every), default=math.inf),
            last_s=max((use.last_s for use in every), default=0.0),
        )


def _sum(value: sa.ColumnElement[Any], where: Condition | None = None) -> sa.ColumnElement[Any]:
    return sa.func.coalesce(sa.func.sum(value if where is None else sa.case((where, value))), 0)


_ONE: sa.ColumnElement[int] = sa.literal_column("1")
_SUMS: Mapping[str, sa.ColumnElement[Any]] = {
    "num_requests": sa.func.count(),
    "num_answered": _sum(_ONE, ANSWERED),
    "num_failed": _sum(_ONE, _R.status >= 500),
    "num_ttft": _sum(_ONE, ANSWERED & _R.ttft_s.is_not(None)),
    **{name: _sum(_R[name]) for name in ("prompt_tokens", "output_tokens", *AMOUNTS)},
    "latency_s": _sum(_R.latency_s),
    "answered_s": _sum(_R.latency_s, ANSWERED),
    "ttft_s": _sum(_R.ttft_s, ANSWERED),
    "first_s": sa.func.min(_R.time_s),
}
_RATINGS = {"num_rated": sa.func.count(FEEDBACK.c.score), "score": _sum(FEEDBACK.c.score)}
# PostgreSQL returns its sums as decimals.
_NUMBER = {field.name: int if field.type == "int" else float for field in fields(Spend)}


def spend(
    source: Database | sa.Connection,
    *,
    by: Sequence[GroupBy | sa.ColumnElement[Any]] = (),
    where: Iterable[Condition] = (),
    rated: bool = False,
) -> list[Spend]:
    """Sum the rows that meet `where`, one entry per group, largest spend first.

    With `rated` users' scores too. Groups without requests have no entry.
    """
    if isinstance(source, Database):
        with source.connect() as connection:
            return spend(connection, by=by, where=where, rated=rated)
    columns = {**_SUMS, **(_RATINGS if rated else {})}
    groups = [
        (grouping(part) if isinstance(part, str) else part).label(f"group_{i}")
        for i, part in enumerate(by)
    ]
    query = (
        sa.select(*groups, *(column.label(name) for name, column in columns.items()))
        .where(*where)
        .group_by(*groups)
        .order_by(sa.desc("usd"), sa.desc("num_requests"))
    )
    if rated:
        query = query.join_from(
            REQUESTS, FEEDBACK, _R.request_id == FEEDBACK.c.request_id, isouter=True
        )
    found = []
    for row in source.execute(query).mappings():
        if row["num_requests"]:
            sums: dict[str, Any] = {name: _NUMBER[name](row[name]) for name in columns}
            group = tuple(_plain(row[f"group_{i}"]) for i in range(len(groups)))
            found.append(Spend(group=group, **sums))
    return found


def total(rows: Iterable[Spend]) -> Spend:
    """Return the sum of all groups, as one without a name."""
    found = list(rows)
    summed: dict[str, Any] = {
        name: sum(getattr(row, name) for row in found) for name in (*_SUMS, *_RATINGS)
    }
    summed["first_s"] = min((row.first_s for row in found), default=0.0)
    return Spend(**summed)


def grouping(name: GroupBy) -> sa.ColumnElement[Any]:
    """Return what rows are grouped by."""
    return start_of(_PERIOD_S[name]) if name in _PERIOD_S else _GROUPS[name]


def start_of(period_s: int) -> sa.ColumnElement[Any]:
    """Return the Unix time at which the row's period of this length began."""
    return sa.cast(sa.func.floor(_R.time_s / period_s), sa.BigInteger) * period_s


def stream(
    database: Database, query: sa.Select[Any], *, rows_per_fetch: int = _ROWS_PER_FETCH
) -> Generator[dict[str, Any]]:
    """Yield the rows of `query` without ever holding more than `rows_per_fetch` of them."""
    with database.connect() as connection:
        options = {"yield_per": rows_per_fetch}
        with connection.execute(query, execution_options=options) as result:
            for row in result.mappings():
                yield dict(row)


def requests(database: Database, *, period: Period = ALWAYS) -> Generator[dict[str, Any]]:
    """Yield the rows of the table `requests` in order of time."""
    return stream(database, sa.select(REQUESTS).where(*period.holds()).order_by(_R.time_s))


def uses(database: Database, *, period: Period = ALWAYS) -> dict[tuple[str, str], Use]:
    """Return what each member used in the rows of `period`, by its name and method."""
    found: dict[tuple[str, str], Use] = {}
    for row in requests(database, period=period):
        for name, tokens in (row["members"] or {}).items():
            cost = (row["costs"] or {}).get(name)
            if cost is not None:
                first_s = row["time_s"]
                use = Use(**cost, **tokens, first_s=first_s, last_s=first_s + row["latency_s"])
                key = (name, use.method)
                found[key] = Use.together((found[key], use)) if key in found else use
    return found


def _plain(value: object) -> str | int | None:
    return value if value is None or isinstance(value, str) else int(str(value))
