"""Keeps an engine running: one that has failed is stopped, and made and started anew.

Knows no kind of engine; whether one has failed, its `check_health` tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from models.engines.base import Chunk, Engine, EngineStats, GenerationRequest, HasMetrics
from models.errors import EngineFailed

logger = logging.getLogger(__name__)

_CHECK_S = 1.0
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0


class SupervisedEngine:
    """An engine that comes back; see `models.engines.base.Engine`.

    Its health is checked every `check_s`. After a failure it is started again, the first time at
    `first_wait_s`, then after twice as long each time, until it has been well for as long as it was
    last waited. Meanwhile requests and `check_health` raise `EngineFailed`.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        *,
        check_s: float = _CHECK_S,
        first_wait_s: float = _FIRST_WAIT_S,
    ) -> None:
        """`make` makes the engine, each time anew."""
        self._make = make
        self._check_s = check_s
        self._first_wait_s = first_wait_s
        self._engine = make()
        self._members = self._engine.members
        self._failure: EngineFailed | None = None
        self._num_restarts = 0
        self._watching: asyncio.Task[None] | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The models that the engine holds."""
        return self._members

    async def start(self) -> None:
        """Start it. What it raises the first time is not tried again."""
        await self._engine.start()
        self._watching = asyncio.create_task(self._watch())

    def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the engine's answer."""
        return self._engine.generate(request)

    def stats(self) -> EngineStats:
        """Return the engine's snapshot, and how often it was started again."""
        return replace(self._engine.stats(), restarts_total=self._num_restarts)

    def metrics(self) -> str:
        """Return its library's metrics; empty where it has none."""
        return self._engine.metrics() if isinstance(self._engine, HasMetrics) else ""

    def check_health(self) -> None:
        """Raise `EngineFailed` while the engine cannot serve, with why it failed."""
        if self._failure is not None:
            raise self._failure
        self._engine.check_health()

    async def stop(self) -> None:
        """Stop it for good; idempotent."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        await self._engine.stop()

    async def _watch(self) -> None:
        wait_s, well_s = self._first_wait_s, 0.0
        while True:
            await asyncio.sleep(self._check_s)
            try:
                self._engine.check_health()
                well_s += self._check_s
                if well_s >= wait_s:
                    wait_s = self._first_wait_s
                continue
            except EngineFailed as error:
                self._failure = EngineFailed(f"the engine is being started again: {error}")
                logger.error("an engine failed and is started again in %g s: %s", wait_s, error)
            await self._restart_after(wait_s)
            wait_s, well_s = min(2 * wait_s, _LONGEST_WAIT_S), 0.0

    async def _restart_after(self, wait_s: float) -> None:
        """Try once. What could not be started fails its next check of health."""
        try:
            await self._engine.stop()
            await asyncio.sleep(wait_s)
            self._engine = self._make()
            await self._engine.start()
        except Exception:  # whatever it is: it is tried again
            logger.exception("an engine could not be started again")
            return
        self._num_restarts += 1
        self._failure = None
