"""The engines' state, summed over their replicas by their clients."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from models.engines.base import EngineStats
from models.errors import EngineError
from router.engines.base import EngineClient
from router.metrics import families as f
from router.metrics.family import Family, Series

_TIMEOUT_S = 3.0  # a scrape is given up after ten


async def engine_gauges(engines: Mapping[str, EngineClient]) -> dict[Series, float]:
    """Ask all `engines` at once; one that fails or is too slow is down."""
    found: dict[Series, float] = {}
    for gauges in await asyncio.gather(*(_ask(*entry) for entry in engines.items())):
        found |= gauges
    return found


async def _ask(name: str, engine: EngineClient) -> dict[Series, float]:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            stats = await engine.stats()
    except (EngineError, TimeoutError):
        return {f.ENGINE_UP.series(name): 0.0}
    return {f.ENGINE_UP.series(name): 1.0, **_gauges(name, stats)}


def _gauges(name: str, stats: EngineStats) -> dict[Series, float]:
    found: dict[Family, float] = {
        f.ENGINE_RUNNING: stats.running_requests,
        f.ENGINE_QUEUED: stats.queued_requests,
        f.ENGINE_LANES: stats.active_lanes,
        f.ENGINE_KV_USED: stats.kv_bytes_used,
        f.ENGINE_KV_CAPACITY: stats.kv_bytes_total,
        f.ENGINE_IDLE_WH: stats.idle_wh,
    }
    if stats.circuit is not None:
        found[f.ENGINE_CIRCUIT_OPEN] = int(stats.circuit == "open")
    return {family.series(name): float(value) for family, value in found.items()}
