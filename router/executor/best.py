"""`Best`: run candidates side by side and select one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING

from models.engines.base import Chunk
from models.errors import EngineError, RequestError
from policies.cascade.base import Attempt, Ranker, normalise
from policies.plan import Best
from router.executor.cascade import collect
from router.executor.scorers import attempt, scores
from router.executor.task import Task
from router.executor.trace import Run, Trace, child_path
from router.executor.votes import decided, majority

if TYPE_CHECKING:
    from router.executor.executor import Executor


async def run_best(
    executor: Executor, best: Best, task: Task, trace: Trace, path: str
) -> AsyncGenerator[Chunk, None]:
    """Yield the selected candidate's answer.

    A candidate that fails doesn't vote; if all fail, the first one's error is raised. Candidates
    that cannot change a majority any more are cancelled.
    """
    paths = [child_path(path, index) for index in range(len(best.candidates))]
    tasks = [
        asyncio.create_task(collect(executor, candidate, task, trace, candidate_path))
        for candidate, candidate_path in zip(best.candidates, paths, strict=True)
    ]
    try:
        await _until_decided(best, tasks)
    finally:
        await _cancel(tasks)
    for child in paths:
        trace.end_below(child, "cancelled")
    runs = [trace.runs[child] for child in paths]
    chosen = await _select(executor, best, task, tasks, runs)
    for index, run in enumerate(runs):
        if index != chosen and _answered(tasks[index]):
            run.outcome = "rejected"
    yield tasks[chosen].result()


async def _until_decided(best: Best, tasks: list[asyncio.Task[Chunk]]) -> None:
    pending = set(tasks)
    while pending:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        _raise_unexpected(tasks)
        votes = [normalise(t.result().text) for t in tasks if _answered(t)]
        if best.select == "majority" and decided(votes, len(pending)):
            return


async def _select(
    executor: Executor,
    best: Best,
    task: Task,
    tasks: list[asyncio.Task[Chunk]],
    runs: list[Run],
) -> int:
    answered = [index for index, candidate in enumerate(tasks) if _answered(candidate)]
    if not answered:
        error = tasks[0].exception()
        assert error is not None
        raise error
    if best.select == "majority":
        votes = [normalise(t.result().text) if _answered(t) else None for t in tasks]
        for index in answered:
            runs[index].score = votes.count(votes[index]) / len(answered)
        winner = majority(votes)
        assert winner is not None
        return winner
    attempts = [attempt(task.query, best.candidates[i], tasks[i].result()) for i in answered]
    for index, score in zip(answered, await _scores(executor, best, attempts), strict=True):
        runs[index].score = score
    return max(answered, key=lambda index: runs[index].score or 0.0)


async def _scores(executor: Executor, best: Best, attempts: list[Attempt]) -> list[float]:
    scorer = executor.catalog.scorers["confidence" if best.select == "confidence" else best.scorer]
    if best.select == "ranker":
        assert isinstance(scorer, Ranker), "the catalog has checked the plan"
        return scorer.rank(attempts)
    # Each candidate's support is the others' answers.
    others = [tuple(other.answer for other in attempts if other is not one) for one in attempts]
    return await scores(
        scorer,
        [replace(one, earlier=earlier) for one, earlier in zip(attempts, others, strict=True)],
    )


def _answered(task: asyncio.Task[Chunk]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _raise_unexpected(tasks: list[asyncio.Task[Chunk]]) -> None:
    for task in tasks:
        error = task.exception() if task.done() and not task.cancelled() else None
        if error is not None and not isinstance(error, EngineError | RequestError):
            raise error


async def _cancel(tasks: list[asyncio.Task[Chunk]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
