"""The metrics of one replica: what it publishes, and the page that it shows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import TypeAlias

from sqlalchemy.exc import SQLAlchemyError

from router.catalog.catalog import Catalog
from router.engines.base import EngineClient
from router.metrics import families as f
from router.metrics.engines import engine_gauges
from router.metrics.exposition import exposition
from router.metrics.family import Series, Values
from router.metrics.libraries import library_metrics
from router.metrics.live import Live, merge
from router.metrics.reports import HOLDER as REPORTS
from router.metrics.reports import Reports
from router.metrics.store import Store
from router.threads import in_thread

logger = logging.getLogger(__name__)

_PUBLISH_EVERY_S = 5.0
# A replica that has not published for so long is gone.
_ALIVE_S = 3 * _PUBLISH_EVERY_S
_FORGET_AFTER_S = 3600.0
_REPORTS_WAIT_S = 3.0
# So that the first failure of a kind is a step from zero, which rates can see.
_STATUSES = ("200", "429", "500", "503", "504")

# Budgets at a Unix time; blocks.
ReadBudgets: TypeAlias = Callable[[float], dict[Series, float]]


class Metrics:
    """Publishes this replica's gauges while it runs, and renders what all replicas know."""

    def __init__(
        self,
        *,
        store: Store,
        live: Live,
        catalog: Catalog,
        engines: Mapping[str, EngineClient],
        holder: str,
        reports: Reports,
        read_budgets: ReadBudgets,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Publish as `holder`, a name that no other replica has."""
        self._store = store
        self._live = live
        self._catalog = catalog
        self._engines = engines
        self._holder = holder
        self._reports = reports
        self._read_budgets = read_budgets
        self._clock = clock

    async def run(self) -> None:
        """Publish every few seconds until cancelled; a failing database is logged once."""
        failing = False
        try:
            while True:
                try:
                    await in_thread(self._publish)
                    failing = False
                except SQLAlchemyError as error:
                    if not failing:
                        logger.warning("metrics: cannot publish: %s", error)
                    failing = True
                await asyncio.sleep(_PUBLISH_EVERY_S)
        finally:
            await self._reports.close()
            # Else it would count as alive for a while.
            with suppress(SQLAlchemyError):
                await in_thread(self._store.forget, before_s=0.0, holder=self._holder)

    async def page(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type, in the format that the `Accept` header wants."""
        await self._reports.renew(wait_s=_REPORTS_WAIT_S)
        telling = self._catalog.members.engines_with_metrics()
        native = [name for name in telling if name in self._engines]
        engines, others, kept = await asyncio.gather(
            engine_gauges(self._engines),
            library_metrics({name: self._engines[name] for name in native}),
            in_thread(self._kept),
        )
        values = {**self._build_info(), **engines, **kept}
        return exposition(values, accept=accept, others=others)

    def _publish(self) -> None:
        now_s = self._clock()
        self._store.publish(
            self._holder, self._live.gauges(), now_s=now_s, counts=self._live.counted()
        )
        self._store.forget(before_s=now_s - _FORGET_AFTER_S)

    def _kept(self) -> Values:
        """Return what all replicas share; what this one alone knows if the database is away."""
        now_s = self._clock()
        up = f.LEDGER_UP.series()
        try:
            snapshots = self._store.snapshots(since_s=now_s - _FORGET_AFTER_S)
            budgets = self._read_budgets(now_s)
            counters = {**self._zeros(), **self._store.counters()}
        except SQLAlchemyError as error:
            logger.warning("metrics: the ledger's database does not answer: %s", error)
            return {**merge([self._live.gauges()]), up: 0.0}
        replicas = [
            found.gauges
            for found in snapshots
            if found.holder != REPORTS and found.time_s > now_s - _ALIVE_S
        ]
        found: dict[Series, float] = {**merge(replicas), **budgets, **counters, up: 1.0}
        for report in snapshots:
            if report.holder == REPORTS:
                found |= report.gauges
                found[f.REPORTS_AGE_S.series()] = now_s - report.time_s
        return found

    def _zeros(self) -> Values:
        policies: Iterable[str] = (*self._catalog.policies, f.NONE)
        return {
            f.REQUESTS.series(policy, f.NONE, status): 0.0
            for policy in policies
            for status in _STATUSES
        } | {f.DROPPED_ROWS.series(): 0.0}

    def _build_info(self) -> Values:
        catalog = self._catalog
        return {f.BUILD_INFO.series(version("shoal"), catalog.pool.name, catalog.fingerprint): 1.0}
