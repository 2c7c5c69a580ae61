"""`Best`: run candidates side by side and select one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from models.engines.base import Chunk
from models.errors import EngineError, RequestError
from policies.plan import Best
from router.executor.cascade import collect
from router.executor.scorers import Confidence
from router.executor.task import Task
from router.executor.trace import Trace, child_path
from router.executor.votes import decided, majority, normalise

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
    chosen = _select(best, task, tasks, trace, paths)
    for index, child in enumerate(paths):
        if index != chosen and _answered(tasks[index]):
            trace.runs[child].outcome = "rejected"
    yield tasks[chosen].result()


async def _until_decided(best: Best, tasks: list[asyncio.Task[Chunk]]) -> None:
    pending = set(tasks)
    while pending:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        _raise_unexpected(tasks)
        votes = [normalise(t.result().text) for t in tasks if _answered(t)]
        if best.select == "majority" and decided(votes, len(pending)):
            return


def _select(
    best: Best, task: Task, tasks: list[asyncio.Task[Chunk]], trace: Trace, paths: list[str]
) -> int:
    answered = [index for index, candidate in enumerate(tasks) if _answered(candidate)]
    if not answered:
        error = tasks[0].exception()
        assert error is not None
        raise error
    if best.select == "majority":
        votes = [normalise(t.result().text) if _answered(t) else None for t in tasks]
        for index in answered:
            trace.runs[paths[index]].score = votes.count(votes[index]) / len(answered)
        winner = majority(votes)
        assert winner is not None
        return winner
    confidence = Confidence()
    for index in answered:
        score = confidence.score(task.query, tasks[index].result())
        trace.runs[paths[index]].score = score
    return max(answered, key=lambda index: trace.runs[paths[index]].score or 0.0)


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
