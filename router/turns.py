"""Tasks that do one request's work side by side take turns, so that others need not wait for all.

The event loop runs what is ready in the order in which it became so. A hundred choices whose tokens
come together are a hundred pieces in that line, at every token, and whoever has a small request
would wait for all of them at each step of its own. Where they take turns, a few of them run in each
round of the loop, so that a request has about as much of a round as any other, however many choices
it has. Nobody does less at once for it: what they wait for, as an engine's answers, goes on.
"""

from __future__ import annotations

import asyncio
import types
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

# One would be fairest, but each round costs system calls, a tenth of what such a request takes.
_STEPS_A_ROUND = 2


async def one_by_one(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield `items`; between two of them others run, who need not wait for all of a hundred."""
    first = True
    for item in items:
        if not first:
            await asyncio.sleep(0)
        first = False
        yield item


class Turns:
    """The turns of one request's tasks, on one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = _STEPS_A_ROUND  # of this round
        self._in_round = False

    def task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Return a task that does `work`; each of its steps, from one wait to the next, is a turn.

        One that is cancelled waits for its turn, too: a hundred that clean up are a hundred pieces.
        """
        task = asyncio.create_task(self._run(work))
        task.add_done_callback(lambda _: work.close())  # where it never began
        return task

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return await self._steps(work)

    @types.coroutine
    def _steps(self, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
        thrown: BaseException | None = None
        while True:
            thrown = yield from self._turn(thrown)
            try:
                awaited = work.send(None) if thrown is None else work.throw(thrown)
            except StopIteration as end:
                result: T = end.value
                return result
            thrown = None
            try:
                yield awaited
            except asyncio.CancelledError as error:
                thrown = error

    def _turn(self, thrown: BaseException | None) -> Generator[Any, Any, BaseException | None]:
        """Wait for a turn, and return `thrown`, or the cancellation that came meanwhile."""
        while not self._left:
            mine = asyncio.get_running_loop().create_future()
            self._waiting.append(mine)
            try:
                yield from mine
            except asyncio.CancelledError as error:
                thrown = error
                if mine.cancelled():
                    continue
            return thrown
        self._left -= 1
        if not self._in_round:
            self._in_round = True
            asyncio.get_running_loop().call_soon(self._end_round)
        return thrown

    def _end_round(self) -> None:
        """Say who runs in the next round."""
        self._left = _STEPS_A_ROUND
        while self._waiting and self._left:
            following = self._waiting.popleft()
            if not following.done():
                following.set_result(None)
                self._left -= 1
        self._in_round = self._left < _STEPS_A_ROUND
        if self._in_round:
            asyncio.get_running_loop().call_soon(self._end_round)
