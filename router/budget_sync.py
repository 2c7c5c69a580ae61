"""Keeps budget targets current beside the requests: what all replicas spent.

A controller sees only its own process's requests. Every few seconds `BudgetSync` asks the ledger
what all requests of its policy have cost since the window began, and tells the controller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import sqlalchemy as sa

from policies.budget import Controller
from router.ledger.database import Database
from router.ledger.queries import ANSWERED, Spend, spend
from router.ledger.schema import REQUESTS

logger = logging.getLogger(__name__)

_INTERVAL_S = 10.0


def read_spending(database: Database, *, policy: str, since_s: float) -> Spend | None:
    """Return what `policy`'s answers have cost since `since_s`; None if nobody asked for any."""
    wanted = (REQUESTS.c.policy == policy, REQUESTS.c.time_s >= since_s, ANSWERED)
    return next(iter(spend(database, where=wanted)), None)


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
                await self._database.reports.run(self.reconcile)
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
                    spent={"usd": spending.usd, "wh": spending.wh, "gco2e": spending.gco2e},
                    first_request_s=spending.first_s,
                )
