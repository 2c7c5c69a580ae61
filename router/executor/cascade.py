"""`Cascade`: try stages in order, stop at the first answer that is good enough (FrugalGPT)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from models.engines.base import Chunk
from models.errors import EngineError, EngineFailed, RequestError
from policies.plan import Cascade, Plan
from router.executor.scorers import attempt
from router.executor.task import Task, merge
from router.executor.trace import Trace, child_path

if TYPE_CHECKING:
    from router.executor.executor import Executor


async def run_cascade(
    executor: Executor, cascade: Cascade, task: Task, trace: Trace, path: str
) -> AsyncGenerator[Chunk, None]:
    """Yield the accepted stage's answer; the last stage streams, as it is accepted unseen.

    A stage that fails or takes too long moves on to the next. If the last one fails before its
    first chunk, the best rejected answer stands in; if there is none, its error is raised.
    """
    scorer = executor.catalog.scorers[cascade.scorer]
    rejected: list[tuple[float, str, Chunk]] = []
    *early, last = enumerate(cascade.stages)
    for (index, stage), threshold in zip(early, cascade.thresholds, strict=True):
        stage_path = child_path(path, index)
        answer = await _attempt(executor, stage, task, trace, stage_path)
        if answer is None:
            continue
        run = trace.runs[stage_path]
        earlier = tuple(text.text for _, _, text in rejected)
        run.score = scorer.score(attempt(task.query, stage, answer, earlier))
        if run.score >= threshold:
            yield answer
            return
        run.outcome = "rejected"
        rejected.append((run.score, stage_path, answer))
    started = False
    try:
        async with aclosing(
            executor.run(last[1], task, trace, child_path(path, last[0]))
        ) as chunks:
            async for chunk in chunks:
                started = True
                yield chunk
    except (EngineError, RequestError):
        if started or not rejected:
            raise
        _, best_path, answer = max(rejected, key=lambda entry: entry[0])
        trace.runs[best_path].outcome = "ok"
        yield answer


async def _attempt(
    executor: Executor, stage: Plan, task: Task, trace: Trace, path: str
) -> Chunk | None:
    """Return a stage's whole answer, or None if it failed or took too long."""
    try:
        async with asyncio.timeout(executor.limits.stage_timeout_s):
            return await collect(executor, stage, task, trace, path)
    except (EngineError, RequestError):
        return None
    except TimeoutError:
        trace.end_below(path, "timeout", "the stage's time was up")
        return None


async def collect(executor: Executor, plan: Plan, task: Task, trace: Trace, path: str) -> Chunk:
    """Return the whole answer of `plan` as one chunk."""
    whole = replace(task, stream=False)
    async with aclosing(executor.run(plan, whole, trace, path)) as chunks:
        answer = merge([chunk async for chunk in chunks])
    if answer.finish_reason is None:
        raise EngineFailed("the engine's answer broke off")
    return answer
