"""Several streams read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def side_by_side(
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """Yield (stream's index, item) as items come. The first error ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as items:
            async for item in items:
                yield 0, item
        return
    ready: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    ready.put_nowait((index, item))
        except Exception as error:
            ready.put_nowait(error)
        else:
            ready.put_nowait(None)

    pumps = [asyncio.ensure_future(pump(*entry)) for entry in enumerate(streams)]
    try:
        num_open = len(pumps)
        while num_open:
            got = await ready.get()
            if got is None:
                num_open -= 1
            elif isinstance(got, BaseException):
                raise got
            else:
                yield got
    finally:
        for pumping in pumps:
            pumping.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def before(deadline_s: float, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yield what `stream` yields; `TimeoutError` when the event loop's clock passes `deadline_s`.

    The limit is set anew around each item, so that the stream may be read by different tasks.
    """
    async with aclosing(stream) as items:
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            yield item
