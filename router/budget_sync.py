"""Keeps budget targets current beside the requests: what all replicas spent.

A controller sees only its own process's requests. Every few seconds `BudgetSync` asks the ledger
what all requests of its policy have cost since the window began, and tells the controller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from policies.budget import Controller
from router.ledger.database import Database
from router.ledger.schema import REQUESTS
from router.threads import in_thread

logger = logging.getLogger(__name__)

_INTERVAL_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What the answered requests of one policy cost since some time."""

    num_requests: int
    first_request_s: float
    spent: Mapping[str, float]


def read_spending(database: Database, *, policy: str, since_s: float) -> Spending | None:
    """Return what `policy` has cost since `since_s`; None if nobody asked for it."""
    columns = REQUESTS.c
    query = sa.select(
        sa.func.count(),
        sa.func.min(columns.time_s),
        *(sa.func.coalesce(sa.func.sum(columns[name]), 0.0) for name in ("usd", "wh", "gco2e")),
    ).where(columns.policy == policy, columns.time_s >= since_s, columns.status < 400)
    with database.connect() as connection:
        count, first_s, usd, wh, gco2e = connection.execute(query).one()
    if not count:
        return None
    return Spending(
        num_requests=count,
        first_request_s=first_s,
        spent={"usd": usd, "wh": wh, "gco2e": gco2e},
    )


class BudgetSync:
    """Reconciles the controllers of some policies with the ledger until cancelled."""

    def __init__(
        self,
        controllers: Mapping[str, Controller],
        database: Database,
        *,
        interval_s: float = _INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take the `controllers` by their policies' names."""
        self._controllers = dict(controllers)
        self._database = database
        self._interval_s = interval_s
        self._clock = clock

    async def run(self) -> None:
        """Reconcile every `interval_s` until cancelled; log a failing database, and go on."""
        while True:
            try:
                await in_thread(self.reconcile)
            except sa.exc.SQLAlchemyError as error:
                logger.warning("budget targets keep their own count for now: %s", error)
            await asyncio.sleep(self._interval_s)

    def reconcile(self) -> None:
        """Reconcile every controller once."""
        for name, controller in self._controllers.items():
            since_s = controller.window_started_s(self._clock())
            spending = read_spending(self._database, policy=name, since_s=since_s)
            if spending is not None:
                controller.reconcile(
                    num_requests=spending.num_requests,
                    spent=spending.spent,
                    first_request_s=spending.first_request_s,
                )
