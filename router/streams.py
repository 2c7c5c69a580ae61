"""How answers are sent: streams read as one, ended in time, as events; and whole ones as JSON.

What a client no longer waits for is cancelled: by the end of its time, or when it hangs up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.turns import Turns

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


async def side_by_side(
    streams: Sequence[AsyncGenerator[T, None]], turns: Turns
) -> AsyncGenerator[tuple[int, T], None]:
    """Yield (stream's index, item) as items come. The first error ends all of them.

    Where there are several they take `turns`.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as items:
            async for item in items:
                yield 0, item
        return
    ready: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()
    pumps = [turns.task(_pump(index, stream, ready)) for index, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            got = await ready.get()
            if got is None:
                num_open -= 1
            elif isinstance(got, Exception):
                raise got
            else:
                yield got
    finally:
        for pumping in pumps:
            pumping.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int,
    stream: AsyncGenerator[T, None],
    ready: asyncio.Queue[tuple[int, T] | Exception | None],
) -> None:
    """Hand on what `stream` yields, and how it ends: by an error, or None."""
    try:
        async with aclosing(stream) as items:
            async for item in items:
                ready.put_nowait((index, item))
    except Exception as error:
        ready.put_nowait(error)
    else:
        ready.put_nowait(None)


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


class ClientDisconnected(Exception):
    """The client hung up before it had its answer."""


async def until_disconnected(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """Return what `work` returns; cancel it and raise `ClientDisconnected` if the client leaves.

    The request's body must have been read.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnected
    finally:
        watcher.cancel()
        if not worker.done():
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# Beyond this, an answer takes so long to write that others should not wait for it.
_INLINE_ENTRIES = 1024
_SLICE = 1024


async def in_json(make: Callable[[], object], num_entries: int) -> bytes:
    """Return what `make` returns as JSON; on another thread where that has many `num_entries`.

    Other requests run meanwhile: no piece of it holds the interpreter's lock for long.
    """

    if num_entries <= _INLINE_ENTRIES:
        return _dumps(make()).encode()
    return await asyncio.to_thread(lambda: _json(make()).encode())


def _json(value: object, depth: int = 6) -> str:
    """Return `value` as JSON, long lists and what stands high in it piece by piece."""
    if depth and isinstance(value, dict):
        return (
            "{"
            + ",".join(f"{_dumps(str(k))}:{_json(v, depth - 1)}" for k, v in value.items())
            + "}"
        )
    if depth and isinstance(value, list | tuple):
        if any(isinstance(entry, dict | list | tuple) for entry in value[:_SLICE]):
            return "[" + ",".join(_json(entry, depth - 1) for entry in value) + "]"
        slices = (value[start : start + _SLICE] for start in range(0, len(value), _SLICE))
        return "[" + ",".join(_dumps(piece)[1:-1] for piece in slices) + "]"
    return _dumps(value)


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def event(data: Mapping[str, Any], *, named: bool = False) -> bytes:
    """Return one event; `named` by its type."""
    name = f"event: {data['type']}\n".encode() if named else b""
    return name + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


COMMENT = b": still at work\n\n"
"""What clients skip: an event stream that is silent for long is cut by proxies."""


async def begun(stream: AsyncGenerator[T, None], timeout_s: float) -> asyncio.Future[T]:
    """Return the first item of `stream`, awaited for `timeout_s`; raises what it raises by then."""
    first = asyncio.ensure_future(anext(stream))
    try:
        await asyncio.wait({first}, timeout=timeout_s)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        raise
    return first


async def with_comments(
    first: asyncio.Future[T], rest: AsyncGenerator[T, None], interval_s: float
) -> AsyncGenerator[T | None, None]:
    """Yield `first`, once it is there, and `rest`; before that None, once each `interval_s`."""
    while not first.done():
        yield None
        await asyncio.wait({first}, timeout=interval_s)
    yield first.result()
    async for item in rest:
        yield item


async def ended(first: asyncio.Future[T], rest: AsyncGenerator[T, None]) -> None:
    """End a stream whose `first` item somebody waits for, wherever it is."""
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await rest.aclose()


class EventStream(Response):
    """Sends events as they come; closes their generator when the client hangs up."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the response."""
        async with aclosing(self._events):
            try:
                await until_disconnected(receive, self._send(send))
            except (ClientDisconnected, OSError):
                return

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            await asyncio.sleep(0)  # many choices may have much to say at once
        await send({"type": "http.response.body", "body": b"", "more_body": False})
