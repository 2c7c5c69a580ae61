"""How much of each cap is used, from the book that all replicas keep in the ledger's database."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from router.caps.amounts import to_number
from router.caps.config import BudgetsConfig
from router.caps.limits import PERIODS, SERVER, Cap, limits, read_caps, window
from router.ledger.database import Database
from router.ledger.schema import API_KEYS, BUDGET_WINDOWS
from router.metrics import families as f
from router.metrics.family import Series

# Keys with the largest shares of their caps used; the others have the ledger's reports.
_MOST_KEYS = 50


def budget_gauges(
    database: Database, config: BudgetsConfig, *, now_s: float
) -> dict[Series, float]:
    """Return use, rest and used share of the server's caps and of the fullest keys' caps; blocks.

    A key shows from its first request in a window on. Its scope is "key:" and its name.
    """
    with database.connect() as connection:
        open_windows = BUDGET_WINDOWS.c.end_s > now_s
        rows = connection.execute(sa.select(BUDGET_WINDOWS).where(open_windows)).mappings()
        used = {str(row["window_id"]): row for row in rows}
        named = {name.partition("|")[0] for name in used} - {SERVER}
        keys = connection.execute(
            sa.select(API_KEYS.c.key_id, API_KEYS.c.name, API_KEYS.c.caps).where(
                API_KEYS.c.key_id.in_(named), API_KEYS.c.revoked_s.is_(None)
            )
        ).all()
    scopes = {SERVER: _scope(SERVER, SERVER, config.server_caps(), used, now_s)}
    for key_id, name, caps in keys:
        every = config.key_caps(read_caps(caps or {}, f"caps of the key {name!r}"))
        scopes[key_id] = _scope(f"key:{name}", key_id, every, used, now_s)
    ratio = f.BUDGET_USED_RATIO.name
    fullest = sorted(
        (gauges for scope, gauges in scopes.items() if scope != SERVER),
        key=lambda gauges: -max((v for s, v in gauges.items() if s[0] == ratio), default=0.0),
    )
    found = dict(scopes[SERVER])
    for gauges in fullest[:_MOST_KEYS]:
        found |= gauges
    return found | _elapsed({series[2] for series in found if series[0] == ratio}, now_s)


def _scope(
    label: str, scope: str, caps: tuple[Cap, ...], used: dict[str, sa.RowMapping], now_s: float
) -> dict[Series, float]:
    found: dict[Series, float] = {}
    for limit in limits(scope, caps, now_s):
        resource, period = limit.cap.resource, limit.cap.period
        row = used.get(limit.window.id)
        column = resource if resource in ("requests", "tokens") else f"nano_{resource}"
        amount = row[f"spent_{column}"] + row[f"held_{column}"] if row is not None else 0
        most = limit.cap.limit
        found |= {
            f.BUDGET_USED[resource].series(label, period): to_number(resource, amount),
            f.BUDGET_REMAINING[resource].series(label, period): to_number(
                resource, max(0, most - amount)
            ),
            f.BUDGET_USED_RATIO.series(label, period, resource): amount / most if most else 1.0,
        }
    return found


def _elapsed(periods: Iterable[str], now_s: float) -> dict[Series, float]:
    found: dict[Series, float] = {}
    for period in PERIODS:
        if period in periods:
            open_now = window(SERVER, period, now_s)
            length_s = open_now.end_s - open_now.start_s
            share = (now_s - open_now.start_s) / length_s
            found[f.BUDGET_ELAPSED_RATIO.series(period)] = share
    return found
