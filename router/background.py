"""What keeps prices and targets current beside the requests, never in their way.

`GridFeed` fetches the grid's carbon intensity from a live feed of the Electricity Maps API's shape
into a `CachedGrid`, which falls back to the shipped table when readings grow stale. `BudgetSync`
tells each policy's controller, which sees only its own process's requests, what all replicas have
spent since its window began, by the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import httpx
import sqlalchemy as sa
from pydantic import BaseModel, Field

from policies.budget.controller import Controller
from policies.carbon.grid import CachedGrid, GridReading
from policies.carbon.settings import FeedSettings
from router.ledger.database import Database
from router.ledger.queries import ANSWERED, Spend, spend
from router.ledger.schema import REQUESTS

logger = logging.getLogger(__name__)

_INTERVAL_S = 10.0


class _Answer(BaseModel):
    """What is read of the feed's answer; it has more fields."""

    carbon_intensity: float = Field(alias="carbonIntensity", ge=0)
    measured: datetime = Field(alias="datetime")


class GridFeed:
    """Fetches one zone's intensity every `refresh_s`; failures are logged once and retried."""

    def __init__(self, settings: FeedSettings, grid: CachedGrid) -> None:
        """Push the readings of `settings.url` into `grid`.

        Raises `ValueError` if the environment lacks the token that the settings name.
        """
        headers = {}
        if settings.token_env is not None:
            token = os.environ.get(settings.token_env)
            if not token:
                raise ValueError(
                    f"carbon.feed.token_env: the environment variable {settings.token_env!r} "
                    "is not set"
                )
            headers["auth-token"] = token
        self._settings = settings
        self._grid = grid
        self._client = httpx.AsyncClient(headers=headers, timeout=settings.timeout_s)
        self._failing = False

    async def run(self) -> None:
        """Refresh until cancelled, then close the connection."""
        try:
            while True:
                await self.refresh()
                await asyncio.sleep(self._settings.refresh_s)
        finally:
            await self._client.aclose()

    async def refresh(self) -> bool:
        """Fetch once; return whether a reading came. Never raises for what the feed does."""
        try:
            response = await self._client.get(
                self._settings.url, params={"zone": self._settings.zone}
            )
            response.raise_for_status()
            answer = _Answer.model_validate_json(response.content)
            if not math.isfinite(answer.carbon_intensity):
                raise ValueError(f"carbonIntensity is {answer.carbon_intensity}")
        except (httpx.HTTPError, ValueError) as error:
            if not self._failing:
                logger.warning("grid feed %s: %s; retrying", self._settings.url, error)
            self._failing = True
            return False
        if self._failing:
            logger.warning("grid feed %s: answers again", self._settings.url)
        self._failing = False
        measured = answer.measured
        self._grid.update(
            GridReading(
                gco2e_per_kwh=answer.carbon_intensity, source=f"live:{self._settings.zone}"
            ),
            measured_s=(measured if measured.tzinfo else measured.replace(tzinfo=UTC)).timestamp(),
        )
        return True


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
        """Take the `controllers` by their policies' names; they may change while it runs."""
        self._controllers = controllers
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
        for name, controller in list(self._controllers.items()):
            since_s = controller.window_started_s(self._clock())
            spending = read_spending(self._database, policy=name, since_s=since_s)
            if spending is not None:
                controller.reconcile(
                    num_requests=spending.num_requests,
                    spent={"usd": spending.usd, "wh": spending.wh, "gco2e": spending.gco2e},
                    first_request_s=spending.first_s,
                )
