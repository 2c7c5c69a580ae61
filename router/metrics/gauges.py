"""Gauges of the present: the engines', the caps', and what each ingress replica alone knows."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping

import sqlalchemy as sa
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from models.engines.base import EngineStats
from models.errors import EngineError
from policies.carbon.grid import CachedGrid
from router.access.book import Tally
from router.access.limits import (
    PERIODS,
    SERVER,
    BudgetsConfig,
    Cap,
    limits,
    read_caps,
    to_number,
    window,
)
from router.access.store import read_tally
from router.editions import Editions
from router.engines import EngineClient
from router.ledger.database import Database
from router.ledger.schema import API_KEYS, BUDGET_WINDOWS, TEAMS
from router.ledger.writer import Ledger
from router.metrics import families as f
from router.metrics.families import Family, Merge, Series, Values
from router.workers import Worker

_STALE = "fallback:"
_TIMEOUT_S = 3.0  # a scrape is given up after ten
# Keys and teams with the largest shares of their caps used; the others have the ledger's reports.
_MOST_KEYS = 50


class Live:
    """This replica's gauges, and what it has counted since it was last asked."""

    def __init__(self, *, editions: Editions, ledger: Ledger, num_replicas: int) -> None:
        """Watch `editions` and `ledger`; the configuration asks for `num_replicas` replicas."""
        self._editions = editions
        self._ledger = ledger
        self._num_replicas = num_replicas
        self._dropped_rows = 0
        self._failures: Counter[str] = Counter()

    def gauges(self) -> dict[Series, float]:
        """Return the gauges of this moment; cheap."""
        edition, catalog = self._editions.current, self._editions.current.catalog
        reading = catalog.prices.grid_reading()
        found = {
            f.REPLICAS_WANTED.series(): float(self._num_replicas),
            f.GRID_INTENSITY.series(): reading.gco2e_per_kwh,
            f.PENDING_ROWS.series(): float(self._ledger.pending_rows),
            f.EDITION.series(): float(edition.number),
            f.EDITION_LOADED_S.series(): edition.loaded_s,
        }
        if isinstance(catalog.prices.grid, CachedGrid):
            found[f.GRID_STALE.series()] = float(reading.source.startswith(_STALE))
        for engine, parts in catalog.prices.devices.items():
            for part, usd in parts.items():
                found[f.DEVICE_USD.series(engine, part)] = usd
        for name, controller in catalog.policies.controllers.items():
            for resource, price in controller.prices().items():
                found[f.PRICES[resource].series(name)] = price
        return found

    def counted(self, workers: Iterable[Worker] = ()) -> Values:
        """Return what was counted since the last `counted`, once."""
        before, self._dropped_rows = self._dropped_rows, self._ledger.dropped_rows
        found = {f.DROPPED_ROWS.series(): float(self._dropped_rows - before)}
        for worker in workers:
            new = worker.num_failures - self._failures[worker.name]
            self._failures[worker.name] += new
            found[f.WORKER_FAILURES.series(worker.name)] = float(new)
        return found


def merge(replicas: Iterable[Values]) -> dict[Series, float]:
    """Return the gauges of all replicas as one, by each family's rule, with their number."""
    gathered: dict[Series, list[float]] = defaultdict(list)
    num_replicas = 0
    for gauges in replicas:
        num_replicas += 1
        for series, value in gauges.items():
            gathered[series].append(value)
    merged = {
        series: _MERGE[f.BY_NAME[series[0]].merge](values)
        for series, values in gathered.items()
        if series[0] in f.BY_NAME
    }
    return {**merged, f.REPLICAS.series(): float(num_replicas)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


_MERGE: dict[Merge, Callable[[list[float]], float]] = {"mean": _mean, "sum": sum, "max": max}


async def engine_gauges(engines: Mapping[str, EngineClient]) -> dict[Series, float]:
    """Ask all `engines` at once; one that fails or is too slow is down."""

    async def ask(name: str, engine: EngineClient) -> dict[Series, float]:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return {f.ENGINE_UP.series(name): 1.0, **_gauges(name, await engine.stats())}
        except (EngineError, TimeoutError):
            return {f.ENGINE_UP.series(name): 0.0}

    found: dict[Series, float] = {}
    for gauges in await asyncio.gather(*(ask(*entry) for entry in engines.items())):
        found |= gauges
    return found


def _gauges(name: str, stats: EngineStats) -> dict[Series, float]:
    found: dict[Family, float] = {
        f.ENGINE_RUNNING: stats.running_requests,
        f.ENGINE_QUEUED: stats.queued_requests,
        f.ENGINE_LANES: stats.active_lanes,
        f.ENGINE_KV_USED: stats.kv_bytes_used,
        f.ENGINE_KV_CAPACITY: stats.kv_bytes_total,
        f.ENGINE_IDLE_WH: stats.idle_wh,
        f.ENGINE_RESTARTS: stats.restarts_total,
        f.ENGINE_GATED_TOKENS: stats.gated_tokens_total,
        f.ENGINE_FUSED_TOKENS: stats.fused_tokens_total,
        f.ENGINE_DRAFTED_TOKENS: stats.drafted_tokens_total,
        f.ENGINE_ACCEPTED_TOKENS: stats.accepted_tokens_total,
    }
    if stats.circuit is not None:
        found[f.ENGINE_CIRCUIT_OPEN] = int(stats.circuit == "open")
    return {family.series(name): float(value) for family, value in found.items()}


async def library_metrics(engines: Mapping[str, EngineClient]) -> list[Metric]:
    """Ask all `engines` for what their own libraries count (vLLM's `vllm:...`).

    One that fails or is too slow is left out. The libraries' own labels stay; ours are
    `shoal_engine` and `shoal_replica`.
    """

    async def ask(name: str, engine: EngineClient) -> tuple[str, list[tuple[str, str]]]:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return name, await engine.metrics()
        except (EngineError, TimeoutError):
            return name, []

    families: dict[str, Metric] = {}
    for name, texts in await asyncio.gather(*(ask(*entry) for entry in engines.items())):
        for replica, text in texts:
            ours = {"shoal_engine": name, "shoal_replica": replica}
            for found in text_string_to_metric_families(text):
                family = families.setdefault(
                    found.name, Metric(found.name, found.documentation, found.type)
                )
                family.samples += [
                    sample._replace(labels={**sample.labels, **ours}) for sample in found.samples
                ]
    return list(families.values())


def budget_gauges(
    database: Database, config: BudgetsConfig, *, now_s: float
) -> dict[Series, float]:
    """Return use, rest and used share of the caps: the server's, the fullest keys' and teams'.

    Blocks. A key shows from its first request in a window on. Scopes are "key:" and a key's name,
    "team:" and a team's.
    """
    with database.connect() as connection:
        open_windows = BUDGET_WINDOWS.c.end_s > now_s
        rows = connection.execute(sa.select(BUDGET_WINDOWS).where(open_windows))
        used = {row.window_id: read_tally(row) for row in rows}
        named = {name.partition("|")[0] for name in used} - {SERVER}
        keys = connection.execute(
            sa.select(API_KEYS.c.key_id, API_KEYS.c.name, API_KEYS.c.caps).where(
                API_KEYS.c.key_id.in_(named), API_KEYS.c.revoked_s.is_(None)
            )
        ).all()
        teams = connection.execute(
            sa.select(TEAMS.c.team_id, TEAMS.c.name, TEAMS.c.caps).where(TEAMS.c.team_id.in_(named))
        ).all()
    scopes = {SERVER: _scope(SERVER, SERVER, config.server_caps(), used, now_s)}
    for key_id, name, caps in keys:
        every = config.key_caps(read_caps(caps or {}, f"caps of the key {name!r}"))
        scopes[key_id] = _scope(f"key:{name}", key_id, every, used, now_s)
    for team_id, name, caps in teams:
        own = read_caps(caps or {}, f"caps of the team {name!r}")
        scopes[team_id] = _scope(f"team:{name}", team_id, own, used, now_s)
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
    label: str, scope: str, caps: tuple[Cap, ...], used: Mapping[str, Tally], now_s: float
) -> dict[Series, float]:
    found: dict[Series, float] = {}
    for limit in limits(scope, caps, now_s):
        resource, period = limit.cap.resource, limit.cap.period
        tally = used.get(limit.window.id, Tally())
        amount = tally.spent.plus(tally.held).get(resource)
        most = limit.cap.limit
        found |= {
            f.BUDGET_USED[resource].series(label, period): to_number(resource, amount),
            f.BUDGET_REMAINING[resource].series(label, period): to_number(
                resource, max(0, most - amount)
            ),
            f.BUDGET_USED_RATIO.series(label, period, resource): amount / most if most else 1.0,
        }
    return found


def _elapsed(periods: Container[str], now_s: float) -> dict[Series, float]:
    found: dict[Series, float] = {}
    for period in PERIODS:
        if period in periods:
            now = window(SERVER, period, now_s)
            share = (now_s - now.start_s) / (now.end_s - now.start_s)
            found[f.BUDGET_ELAPSED_RATIO.series(period)] = share
    return found
