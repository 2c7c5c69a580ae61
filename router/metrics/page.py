"""`GET /metrics`: what a replica publishes, and the page that shows what all replicas know.

The page is Prometheus' text format, or OpenMetrics where the scraper prefers that.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import accumulate

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import PlainTextResponse

from policies.budget.controller import Controller
from policies.experiments.shadow import Shadow
from router.access.authentication import Identify
from router.config import AppArgs
from router.editions import Editions
from router.engines import EngineClient
from router.experiments.experiments import Experiments
from router.ledger.writer import Ledger
from router.metrics import families as f
from router.metrics.counting import Store
from router.metrics.families import BY_NAME, FAMILIES, SUM, Family, Series, Values
from router.metrics.gauges import Live, budget_gauges, engine_gauges, library_metrics, merge
from router.metrics.reports import HOLDER as REPORTS
from router.metrics.reports import Reports
from router.openapi import described
from router.workers import Worker

logger = logging.getLogger(__name__)

_PUBLISH_EVERY_S = 5.0
# A replica that has not published for so long is gone.
_ALIVE_S = 3 * _PUBLISH_EVERY_S
_FORGET_AFTER_S = 3600.0
_REPORTS_WAIT_S = 3.0
# So that the first failure of a kind is a step from zero, which rates can see.
_STATUSES = ("200", "429", "500", "503", "504")


class Metrics:
    """Publishes this replica's gauges while it runs, and renders what all replicas know."""

    def __init__(
        self,
        args: AppArgs,
        editions: Editions,
        *,
        engines: Mapping[str, EngineClient],
        ledger: Ledger,
        experiments: Experiments,
        shadows: Sequence[Shadow],
        controllers: Mapping[str, Controller],
    ) -> None:
        """Share the figures of all replicas with this `ledger`.

        The failures of `workers`, which the service sets, are counted.
        """
        self._database = ledger.database
        self._store = Store(ledger.database)
        self._live = Live(editions=editions, ledger=ledger, num_replicas=args.ingress.min_replicas)
        self._editions = editions
        self._engines = engines
        self._holder = f"{socket.gethostname()}-{uuid.uuid4().hex}"
        self._reports = Reports(
            self._store, experiments=experiments, shadows=shadows, controllers=controllers
        )
        self.workers: tuple[Worker, ...] = ()

    async def run(self) -> None:
        """Publish every few seconds until cancelled; a failing database is logged once."""
        failing = False
        try:
            while True:
                try:
                    await self._database.calls.run(self._publish)
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
                await self._database.calls.run(
                    self._store.forget, before_s=0.0, holder=self._holder
                )

    async def page(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type, in the format that the `Accept` header wants."""
        await self._reports.renew(wait_s=_REPORTS_WAIT_S)
        telling = self._editions.current.catalog.members.engines_with_metrics()
        native = [name for name in telling if name in self._engines]
        engines, others, kept = await asyncio.gather(
            engine_gauges(self._engines),
            library_metrics({name: self._engines[name] for name in native}),
            self._database.reports.run(self._kept),
        )
        values = {**self._build_info(), **engines, **kept}
        return await asyncio.to_thread(exposition, values, accept=accept, others=others)

    def _publish(self) -> None:
        now_s = time.time()
        self._store.publish(
            self._holder, self._live.gauges(), now_s=now_s, counts=self._live.counted(self.workers)
        )
        self._store.forget(before_s=now_s - _FORGET_AFTER_S)

    def _kept(self) -> Values:
        """Return what all replicas share; what this one alone knows if the database is away."""
        now_s = time.time()
        up = f.LEDGER_UP.series()
        try:
            snapshots = self._store.snapshots(since_s=now_s - _FORGET_AFTER_S)
            caps = self._editions.current.args.budgets
            budgets = budget_gauges(self._database, caps, now_s=now_s)
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
        policies: Iterable[str] = (*self._editions.current.catalog.policies, f.NONE)
        return {
            f.REQUESTS.series(policy, f.NONE, status): 0.0
            for policy in policies
            for status in _STATUSES
        } | {f.DROPPED_ROWS.series(): 0.0}

    def _build_info(self) -> Values:
        catalog = self._editions.current.catalog
        return {f.BUILD_INFO.series(version("shoal"), catalog.pool.name, catalog.fingerprint): 1.0}


def exposition(values: Values, *, accept: str, others: Iterable[Metric] = ()) -> tuple[bytes, str]:
    """Return the page of `values` and its content type, as the `Accept` header wants it.

    What other libraries count stands after our own.

    The registry lives for one page: what has gone from the configuration is gone from the page.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(values, others))
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # it asks for a version that is no number
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


class _Page(Collector):
    def __init__(self, values: Values, others: Iterable[Metric]) -> None:
        self._others = others
        self._by_family: dict[str, dict[Series, float]] = defaultdict(dict)
        for (name, *labels), value in values.items():
            family = BY_NAME.get(name)
            # Another version of Shoal may have written it.
            if family is not None and len(labels) == len(family.labels) + bool(family.buckets):
                self._by_family[name][tuple(labels)] = value

    def collect(self) -> Iterator[Metric]:
        """Yield the families that have values."""
        for family in FAMILIES:
            found = self._by_family.get(family.name, {})
            if found:
                yield (_histogram if family.buckets else _plain)(family, found)
        yield from self._others


def _plain(family: Family, values: dict[Series, float]) -> Metric:
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.help, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def _histogram(family: Family, values: dict[Series, float]) -> Metric:
    metric = HistogramMetricFamily(family.name, family.help, labels=family.labels)
    sums: dict[Series, float] = {}
    counts: dict[Series, list[float]] = defaultdict(lambda: [0.0] * (len(family.buckets) + 1))
    for (*labels, bucket), value in values.items():
        if bucket == SUM:
            sums[tuple(labels)] = value
        else:
            # A bound of an earlier version counts in the next one that there is.
            counts[tuple(labels)][bisect_left(family.buckets, float(bucket))] += value
    bounds = (*map(str, family.buckets), "+Inf")
    for series, found in counts.items():
        cumulated = list(zip(bounds, accumulate(found), strict=True))
        metric.add_metric(series, cumulated, sums.get(series, 0.0))
    return metric


def add_metrics_route(api: FastAPI, metrics: Metrics, *, identify: Identify) -> None:
    """Add `GET /metrics` for those whom `identify` lets in."""

    async def page(request: Request) -> Response:
        await identify(request)
        content, content_type = await metrics.page(request.headers.get("accept", ""))
        return Response(content, media_type=content_type)

    api.add_api_route(
        "/metrics",
        page,
        methods=["GET"],
        response_class=PlainTextResponse,
        openapi_extra=described(None, media_type="text/plain"),
    )
