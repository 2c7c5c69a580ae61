"""Executors over pools, scripted or real, and plans that run on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import yaml

from models.engines.base import Chunk, SamplingOptions
from models.engines.registry import create_engine
from models.pool import Pool, load_pool
from policies.base import Query
from policies.cascade.base import Scorer
from policies.plan import Plan
from router.catalog.catalog import load_catalog
from router.config import ServingLimits
from router.engines import EngineWorker
from router.executor.executor import Executor
from router.executor.task import Prompt, Task
from router.executor.trace import Trace


def workers_of(pool: Pool) -> dict[str, EngineWorker]:
    """Return the pool's engines, not yet started."""
    return {
        spec.name: EngineWorker(create_engine(spec, pool.models_of(spec.name)))
        for spec in pool.engines
    }


def executor_of(
    pool: Pool,
    engines: Mapping[str, EngineWorker],
    scorers: Mapping[str, Scorer] | None = None,
    **limits: Any,
) -> Executor:
    """Return what runs plans on `engines`; `scorers` add to the pool's."""
    catalog = load_catalog(pool)
    return Executor(
        engines=engines,
        members=catalog.members,
        scorers={**catalog.policies.scorers, **(scorers or {})},
        limits=ServingLimits(**limits),
    )


def scripted(
    folder: Path,
    scripts: Mapping[str, Any],
    scorers: Mapping[str, Scorer] | None = None,
    **limits: Any,
) -> Executor:
    """Return an executor over a fake engine whose models play `scripts`."""
    content = {
        "name": "p",
        "engines": [{"name": "e", "kind": "fake", "options": {"models": dict(scripts)}}],
        "models": [{"name": name, "engine": "e"} for name in scripts],
    }
    (folder / "pool.yaml").write_text(yaml.safe_dump(content))
    pool = load_pool(folder)
    return executor_of(pool, workers_of(pool), scorers, **limits)


def says(text: str, probability: float = 0.9, **script: Any) -> dict[str, Any]:
    """Return the script of an answer whose tokens all have `probability`."""
    return {"answers": [text], "logprob": math.log(probability), **script}


def task_of(
    text: str = "q",
    *,
    prompt: Prompt | None = None,
    stream: bool = False,
    max_tokens: int | None = None,
    **sampling: Any,
) -> Task:
    """Return what a client asks who sends `text`."""
    return Task(
        request_id="r",
        query=Query(text=text),
        prompt=prompt or Prompt(text=text),
        sampling=SamplingOptions(**sampling),
        max_tokens=max_tokens,
        stream=stream,
    )


async def chunks_of(executor: Executor, plan: Plan, task: Task, trace: Trace) -> list[Chunk]:
    """Run `plan` and return the whole stream."""
    async with aclosing(executor.run(plan, task, trace)) as chunks:
        return [chunk async for chunk in chunks]
