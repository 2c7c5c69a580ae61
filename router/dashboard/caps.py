"""What is left of the server's budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from router.caps.amounts import RESOURCES, to_number
from router.caps.limits import SERVER, Cap, limits
from router.ledger.schema import BUDGET_WINDOWS

_SPENT = dict(
    zip(
        RESOURCES,
        ("spent_requests", "spent_tokens", "spent_nano_usd", "spent_nano_wh", "spent_nano_gco2e"),
        strict=True,
    )
)


def spent_of_caps(
    connection: sa.Connection, caps: Sequence[Cap], *, now_s: float
) -> list[dict[str, Any]]:
    """Return what is spent of each of the server's `caps` in the period that is open now."""
    open_now = limits(SERVER, tuple(caps), now_s)
    wanted = sa.select(BUDGET_WINDOWS).where(
        BUDGET_WINDOWS.c.window_id.in_([limit.window.id for limit in open_now])
    )
    rows = {row["window_id"]: row for row in connection.execute(wanted).mappings()}
    found = []
    for limit in open_now:
        row, resource = rows.get(limit.window.id), limit.cap.resource
        spent = 0 if row is None else int(row[_SPENT[resource]])
        found.append(
            {
                "name": limit.cap.name,
                "resource": resource,
                "spent": to_number(resource, spent),
                "limit": to_number(resource, limit.cap.limit),
                "ends_s": limit.window.end_s,
            }
        )
    return found
