"""What the engines' own libraries count (vLLM's `vllm:...`), told apart by engine and replica."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from models.errors import EngineError
from router.engines.base import EngineClient

_TIMEOUT_S = 3.0  # a scrape is given up after ten


async def library_metrics(engines: Mapping[str, EngineClient]) -> list[Metric]:
    """Ask all `engines` at once; one that fails or is too slow is left out.

    The libraries' own labels stay; ours are `shoal_engine` and `shoal_replica`.
    """
    families: dict[str, Metric] = {}
    for name, texts in await asyncio.gather(*(_ask(*entry) for entry in engines.items())):
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


async def _ask(name: str, engine: EngineClient) -> tuple[str, list[tuple[str, str]]]:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return name, await engine.metrics()
    except (EngineError, TimeoutError):
        return name, []
