"""Many choices of one request leave room for others between them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest

from models.engines.base import Chunk, GenerationRequest
from policies.plan import from_json
from router.engines import EngineWorker
from router.executor.executor import Executor
from router.executor.trace import Trace
from router.streams import side_by_side
from router.turns import Turns
from tests.router.executor.running import chunks_of, scripted, task_of

NUM_CHOICES = 64
FEW = 4
"""How many steps of one request may stand between two of another."""

pytestmark = pytest.mark.anyio


class Rounds:
    """Counts what is done in each round of the event loop, as another request would wait for it."""

    def __init__(self) -> None:
        self.steps: Counter[int] = Counter()
        self.number = 0
        self._counting = asyncio.create_task(self._count())

    def step(self) -> None:
        """Count one."""
        self.steps[self.number] += 1

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.number += 1


class Watched(EngineWorker):
    """An engine whose answers all come at the same moment, once all were asked for."""

    def __init__(self, engine: EngineWorker, rounds: Rounds) -> None:
        self._inner = engine
        self._rounds = rounds
        self._num_asked = 0
        self._all_asked = asyncio.Event()

    async def complete(self, request: GenerationRequest) -> Chunk:
        """Answer."""
        self._rounds.step()
        self._num_asked += 1
        if self._num_asked == NUM_CHOICES:
            self._all_asked.set()
        await self._all_asked.wait()
        self._rounds.step()
        return await self._inner.complete(request)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Answer in one piece."""
        yield await self.complete(request)


def _watched(folder: Path) -> tuple[Executor, Rounds]:
    executor, rounds = scripted(folder, {"a": {"answers": ["x"]}}), Rounds()
    [(name, engine)] = executor.engines.items()
    assert isinstance(engine, EngineWorker)
    executor.engines = {name: Watched(engine, rounds)}
    return executor, rounds


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_take_turns(tmp_path: Path, *, stream: bool) -> None:
    """Choices that begin together, and whose answers come together, run a few in each round.

    All of them are with the engine at once all the same.
    """
    executor, rounds = _watched(tmp_path)
    tasks = [replace(task_of(), request_id=f"{i}", stream=stream) for i in range(NUM_CHOICES)]
    choices = [executor.first_of((from_json("a"),), task, Trace()) for task in tasks]
    answers = [got async for got in side_by_side(choices, executor.turns)]
    assert {index for index, chunk in answers if chunk.finish_reason} == {*range(NUM_CHOICES)}
    assert rounds.steps.total() == 2 * NUM_CHOICES
    assert max(rounds.steps.values()) <= FEW


async def test_candidates_take_turns(tmp_path: Path) -> None:
    """So do a plan's candidates."""
    executor, rounds = _watched(tmp_path)
    plan = from_json({"best": {"candidates": ["a"] * NUM_CHOICES, "select": "confidence"}})
    [answer] = await chunks_of(executor, plan, task_of(), Trace())
    assert answer.text == "x"
    assert rounds.steps.total() == 2 * NUM_CHOICES
    assert max(rounds.steps.values()) <= FEW


async def test_cleaning_up_takes_turns() -> None:
    """Who is cancelled, waiting for its turn or for something else, is told in its turn."""
    rounds, turns = Rounds(), Turns()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            rounds.step()

    waiting = [turns.task(work()) for _ in range(NUM_CHOICES)]
    for _ in range(NUM_CHOICES // 4):  # some of them begin
        await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in done)
    assert 0 < rounds.steps.total() < NUM_CHOICES
    assert max(rounds.steps.values()) <= FEW


async def test_cancelled_before_it_began() -> None:
    """What is cancelled at once is closed, so that nobody is told of work that was never begun."""
    turns = Turns()

    async def work() -> None:
        raise AssertionError

    work_ = work()
    task = turns.task(work_)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        work_.send(None)


async def test_timeouts_and_errors_stay() -> None:
    """A time limit inside ends what it is about, results and errors come out."""
    turns = Turns()

    async def limited() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            return "late"
        return "in time"

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    assert await asyncio.gather(*(turns.task(limited()) for _ in range(9))) == ["late"] * 9
    with pytest.raises(ValueError, match="no"):
        await turns.task(failing())
