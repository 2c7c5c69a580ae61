"""Everything that the page shows of the ledger, as fresh as its cost allows.

What was asked and spent over time, who answered, how good and dear that was, and what is left of
the server's budgets. Rows of shadows are summed apart: no client asked for them. Quality is users'
feedback: a mean score in [0, 1] of the answers that were rated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from policies.evaluation.metrics import wilson_interval
from router.access.book import Tally
from router.access.limits import SERVER, Cap, limits, to_number
from router.access.store import read_tally
from router.ledger.database import Database
from router.ledger.queries import ANSWERED, SERVED, Spend, spend, start_of, total
from router.ledger.schema import BUDGET_WINDOWS, REQUESTS

# All pages together keep the database busy for at most this share of the time.
_SHARE = 0.05
_FRESH_S = 1.0
# The rarest combinations of policy and members are left out beyond this many.
_MOST_KINDS = 64
OWN_PLAN = "plan in the request"

_R = REQUESTS.c


@dataclass(frozen=True, kw_only=True)
class Window:
    """The last `length_s` seconds, in buckets that begin at multiples of `bucket_s`."""

    length_s: int
    bucket_s: int

    def starts_s(self, now_s: float) -> list[int]:
        """Return the Unix times at which the buckets begin; the last one is still filling."""
        last_s = int(now_s // self.bucket_s) * self.bucket_s
        return list(range(last_s - self.length_s + self.bucket_s, last_s + 1, self.bucket_s))


WINDOWS: Mapping[str, Window] = {
    "15m": Window(length_s=900, bucket_s=10),
    "1h": Window(length_s=3600, bucket_s=60),
    "24h": Window(length_s=86400, bucket_s=900),
    "7d": Window(length_s=7 * 86400, bucket_s=7200),
    "30d": Window(length_s=30 * 86400, bucket_s=28800),
}


class Figures:
    """The figures of one replica's pages. `clock` is Unix time; used on one event loop."""

    def __init__(
        self,
        database: Database,
        caps: Callable[[], Sequence[Cap]],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._caps = caps
        self._clock = clock
        self._kept: dict[str, tuple[float, dict[str, Any]]] = {}
        self._querying = asyncio.Lock()

    async def of(self, window: str) -> dict[str, Any]:
        """Return the figures of the window called `window`; `KeyError` if there is none.

        They are kept for a second, or for as long as keeps the database free for requests.
        """
        async with self._querying:
            until_s, found = self._kept.get(window, (0.0, {}))
            if self._clock() < until_s:
                return found
            began_s = time.perf_counter()
            found = await self._database.reports.run(self._query, window)
            took_s = time.perf_counter() - began_s
            self._kept[window] = (self._clock() + max(_FRESH_S, took_s / _SHARE), found)
            return found

    def _query(self, name: str) -> dict[str, Any]:
        window, now_s = WINDOWS[name], self._clock()
        with self._database.connect() as connection:
            return {
                "object": "dashboard",
                "window": name,
                "windows": list(WINDOWS),
                "now_s": now_s,
                "bucket_s": window.bucket_s,
                **spending(connection, window, now_s=now_s),
                "choices": choices(connection, since_s=window.starts_s(now_s)[0]),
                "budgets": spent_of_caps(connection, self._caps(), now_s=now_s),
            }


def spending(connection: sa.Connection, window: Window, *, now_s: float) -> dict[str, Any]:
    """Return the totals of `window`, those of shadows, and a series of each figure.

    `latency_s` and `ttft_s` are means over answers, None where there are none; `failed` is the
    server's fault (5xx).
    """
    starts_s = window.starts_s(now_s)
    shadow = sa.case((SERVED, 0), else_=1)
    rows = spend(
        connection, by=[start_of(window.bucket_s), shadow], where=[_R.time_s >= starts_s[0]]
    )
    served = {row.group[0]: row for row in rows if not row.group[1]}
    # A bucket without requests has spent nothing and took no time.
    series = [_figures(served.get(start_s, Spend())) for start_s in starts_s]
    shadowed = _figures(total(row for row in rows if row.group[1]))
    return {
        "totals": _figures(total(served.values())),
        "shadows": {name: shadowed[name] for name in ("requests", "usd", "wh", "gco2e")},
        "series": {
            "time_s": [*starts_s],
            **{name: [row[name] for row in series] for name in series[0]},
        },
    }


def _figures(row: Spend) -> dict[str, float | None]:
    return {
        "requests": float(row.num_requests),
        "answered": float(row.num_answered),
        "failed": float(row.num_failed),
        "prompt_tokens": float(row.prompt_tokens),
        "output_tokens": float(row.output_tokens),
        **{
            name: getattr(row, name)
            for unit in ("usd", "wh", "gco2e")
            for name in (unit, f"{unit}_low", f"{unit}_high")
        },
        "joules_per_token": row.joules_per_token,
        "latency_s": row.answered_s / row.num_answered if row.num_answered else None,
        "ttft_s": row.ttft_s / row.num_ttft if row.num_ttft else None,
    }


def choices(connection: sa.Connection, *, since_s: float) -> list[dict[str, Any]]:
    """Return what decided since the Unix time `since_s`: policies, then models asked for by name.

    Each has its requests, mean cost per 1,000 of them, mean latency, `quality` (None without
    feedback) and `answered_by`: how often which members had a hand in the answer.
    """
    # Refused requests name whatever a client sent; answered ones only what the pool has.
    where = [_R.time_s >= since_s, ANSWERED, SERVED]
    model = sa.case((_R.policy.is_(None), _R.model), else_=None)
    rows = spend(connection, by=[_R.policy, model, _R.answered_by], where=where, rated=True)
    chosen: dict[tuple[str, str], list[Spend]] = {}
    for row in sorted(rows, key=lambda row: -row.num_requests)[:_MOST_KINDS]:
        policy, named, answered_by = row.group
        if policy is not None:
            name = ("policy", str(policy))
        elif named == answered_by:
            name = ("model", str(named))
        else:
            name = ("plan", OWN_PLAN)
        chosen.setdefault(name, []).append(row)
    found = [_choice(kind, name, rows) for (kind, name), rows in chosen.items()]
    return sorted(found, key=lambda choice: -choice["requests"])


def _choice(kind: str, name: str, rows: list[Spend]) -> dict[str, Any]:
    all_rows = total(rows)
    num_requests, num_rated, quality = all_rows.num_requests, all_rows.num_rated, None
    if num_rated:
        low, high = wilson_interval(all_rows.score, num_rated)
        mean = all_rows.score / num_rated
        quality = {"mean": mean, "low": low, "high": high, "num_rated": num_rated}
    return {
        "kind": kind,
        "name": name,
        "requests": num_requests,
        **{
            f"{key}_per_1000": getattr(all_rows, key) / num_requests * 1000
            for key in ("usd", "wh", "gco2e")
        },
        "latency_s": all_rows.latency_s / num_requests,
        "quality": quality,
        "answered_by": [
            {
                "members": str(row.group[2]).split("+") if row.group[2] else [],
                "requests": row.num_requests,
            }
            for row in rows
        ],
    }


def spent_of_caps(
    connection: sa.Connection, caps: Sequence[Cap], *, now_s: float
) -> list[dict[str, Any]]:
    """Return what is spent of each of the server's `caps` in the period that is open now."""
    open_now = limits(SERVER, tuple(caps), now_s)
    wanted = sa.select(BUDGET_WINDOWS).where(
        BUDGET_WINDOWS.c.window_id.in_([limit.window.id for limit in open_now])
    )
    tallies = {row.window_id: read_tally(row) for row in connection.execute(wanted)}
    found = []
    for limit in open_now:
        tally, resource = tallies.get(limit.window.id, Tally()), limit.cap.resource
        found.append(
            {
                "name": limit.cap.name,
                "resource": resource,
                "spent": to_number(resource, tally.spent.get(resource)),
                "limit": to_number(resource, limit.cap.limit),
                "ends_s": limit.window.end_s,
            }
        )
    return found
