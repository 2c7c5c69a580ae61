"""`Cascade`: try stages in order, stop at the first answer that is good enough (FrugalGPT)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from models.engines.base import Chunk
from models.errors import EngineError, EngineFailed, RequestError
from policies.cascade.base import PrefixScorer
from policies.plan import Answer, Cascade, Plan
from router.executor.scorers import attempt, scores
from router.executor.task import Task, merge
from router.executor.trace import Trace, child_path

if TYPE_CHECKING:
    from router.executor.executor import Executor

# Shorter answers end before watching them, token by token, pays.
_LEAST_WATCHED_TOKENS = 16
# A bound's own rounding must not stop an answer that would just reach its threshold.
_ROUNDING = 1e-9


async def run_cascade(
    executor: Executor, cascade: Cascade, task: Task, trace: Trace, path: str
) -> AsyncGenerator[Chunk, None]:
    """Yield the accepted stage's answer; the last stage streams, as it is accepted unseen.

    A stage that fails or takes too long moves on to the next, and so does one whose score, by the
    answer's beginning, cannot reach the threshold any more. If the last one fails before its first
    chunk, the best rejected answer stands in; if there is none, its error is raised.
    """
    scorer = executor.catalog.scorers[cascade.scorer]
    rejected: list[tuple[float, str, Chunk]] = []
    earlier: tuple[str, ...] = ()
    *early, last = enumerate(cascade.stages)
    timeouts_s = cascade.timeouts_s or (None,) * len(early)
    for (index, stage), threshold, given_s in zip(
        early, cascade.thresholds, timeouts_s, strict=True
    ):
        stage_path = child_path(path, index)
        hopeless = _hopeless(executor, cascade, stage, threshold, task)
        timeout_s = executor.limits.stage_timeout_s if given_s is None else given_s
        answer = await _attempt(
            executor, stage, task, trace, stage_path, hopeless=hopeless, timeout_s=timeout_s
        )
        if answer is None:
            continue
        if answer.finish_reason is not None:
            run = trace.runs[stage_path]
            [run.score] = await scores(scorer, [attempt(task.query, stage, answer, earlier)])
            if run.score >= threshold:
                yield answer
                return
            run.outcome = "rejected"
            rejected.append((run.score, stage_path, answer))
        earlier = (*earlier, answer.text)
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
    executor: Executor,
    stage: Plan,
    task: Task,
    trace: Trace,
    path: str,
    *,
    hopeless: Callable[[Chunk], bool] | None,
    timeout_s: float,
) -> Chunk | None:
    """Return a stage's answer, or None if it failed or took too long.

    It is whole, or, without a finish reason, the beginning that `hopeless` gave up.
    """
    end_s = asyncio.get_running_loop().time() + timeout_s
    task = replace(task, deadline_s=min(end_s, task.deadline_s or end_s))
    try:
        async with asyncio.timeout(timeout_s):
            if hopeless is not None:
                return await _watch(executor, stage, task, trace, path, hopeless=hopeless)
            return await collect(executor, stage, task, trace, path)
    except (EngineError, RequestError):
        return None
    except TimeoutError:
        trace.end_below(path, "timeout", "the stage's time was up")
        return None


def _hopeless(
    executor: Executor, cascade: Cascade, stage: Plan, threshold: float, task: Task
) -> Callable[[Chunk], bool] | None:
    """Return what tells from an answer's beginning that it will not reach `threshold`, if it can.

    None where the scorer cannot say, or where the stage is no `Answer` whose tokens come in turn.
    """
    scorer = executor.catalog.scorers[cascade.scorer]
    if not isinstance(scorer, PrefixScorer) or not isinstance(stage, Answer):
        return None
    # The engine may allow fewer, which only lowers the bound.
    max_tokens = task.max_tokens or executor.limits.default_max_tokens
    if max_tokens < _LEAST_WATCHED_TOKENS:
        return None

    def hopeless(beginning: Chunk) -> bool:
        prefix = attempt(task.query, stage, beginning, finished=False)
        return scorer.ceiling(prefix, max_tokens) < threshold - _ROUNDING

    return hopeless


async def _watch(
    executor: Executor,
    stage: Plan,
    task: Task,
    trace: Trace,
    path: str,
    *,
    hopeless: Callable[[Chunk], bool],
) -> Chunk:
    """Return a stage's answer, cut off (its lanes cancelled) as soon as it is `hopeless`.

    It is judged whenever it has grown by a quarter, so that all judging together costs as much as
    reading the answer a few times.
    """
    chunks: list[Chunk] = []
    num_tokens = num_judged = 0
    streamed = replace(task, stream=True)
    async with aclosing(executor.run(stage, streamed, trace, path)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            num_tokens += len(chunk.tokens)
            if chunk.finish_reason is None and num_tokens > num_judged + num_judged // 4:
                num_judged = num_tokens
                chunks = [merge(chunks)]
                if hopeless(chunks[0]):
                    break
        else:
            return _whole(chunks)
    trace.end(trace.runs[path], "hopeless")
    return chunks[0]


async def collect(executor: Executor, plan: Plan, task: Task, trace: Trace, path: str) -> Chunk:
    """Return the whole answer of `plan` as one chunk."""
    whole = replace(task, stream=False)
    async with aclosing(executor.run(plan, whole, trace, path)) as chunks:
        return _whole([chunk async for chunk in chunks])


def _whole(chunks: list[Chunk]) -> Chunk:
    answer = merge(chunks)
    if answer.finish_reason is None:
        raise EngineFailed("the engine's answer broke off")
    return answer
