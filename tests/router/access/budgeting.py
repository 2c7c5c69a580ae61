"""What the tests of budgets share: replicas' budgets on one database."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from policies.footprint import Cost
from router.access.budgets import Budgets
from router.access.keys import Key
from router.access.limits import Amounts, read_caps, window
from router.ledger.database import Database
from router.ledger.schema import BUDGET_WINDOWS

NOW_S = 1_800_000_000.0
NewBudgets = Callable[..., Budgets]


def tokens(count: int) -> Amounts:
    """Return one request of `count` tokens."""
    return Amounts.of(tokens=count, cost=Cost())


def key(**caps: float) -> Key:
    """Return a key with caps."""
    return Key(id="key_a", name="team", prefix="sk-shoal-abcd", caps=read_caps(caps, "test"))


def spent(database: Database, scope: str = "server", period: str = "day") -> tuple[int, int]:
    """Return the tokens spent and held in the window that is open at NOW_S."""
    name = window(scope, period, NOW_S).id
    query = sa.select(BUDGET_WINDOWS).where(BUDGET_WINDOWS.c.window_id == name)
    with database.connect() as connection:
        row = connection.execute(query).one()
    return row.spent_tokens, row.held_tokens
