"""Keeps the grid's carbon intensity current from a live feed of the Electricity Maps API's shape.

Runs beside the requests, never in their way: it fetches in the background and pushes readings into
a `CachedGrid`, which falls back to the shipped table when they grow stale.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from datetime import UTC, datetime

import httpx
from pydantic import BaseModel, Field

from policies.carbon.grid import CachedGrid, GridReading
from policies.carbon.settings import FeedSettings

logger = logging.getLogger(__name__)


class _Answer(BaseModel):
    """What is read of the feed's answer; it has more fields."""

    carbon_intensity: float = Field(alias="carbonIntensity", ge=0)
    measured: datetime = Field(alias="datetime")


class GridFeed:
    """Fetches one zone's intensity every `refresh_s`; failures are logged once and retried."""

    def __init__(
        self,
        settings: FeedSettings,
        grid: CachedGrid,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Push the readings of `settings.url` into `grid`; `transport` None is the network.

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
        self._client = httpx.AsyncClient(
            headers=headers, timeout=settings.timeout_s, transport=transport
        )
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
