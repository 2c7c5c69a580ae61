"""An HTTP server that misbehaves as told: statuses, silence, answers cut off in the middle."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

HANG = "hang"
CUT = "cut"
"""What a reply may end in: silence, or a connection that breaks."""


@dataclass
class Reply:
    """One scripted response. `events` are sent as an event stream where the status is 200.

    Bytes are sent as they are, each as a chunk of its own.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    events: list[Any] = field(default_factory=list)
    end: str = ""


@dataclass
class BadServer:
    """Answers the requests with `replies` in turn, the last one for ever; remembers them all."""

    replies: list[Reply]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    num_connections: int = 0
    num_broken: int = 0

    @classmethod
    @asynccontextmanager
    async def running(cls, *replies: Reply) -> AsyncIterator[Self]:
        """Listen on a free port."""
        bad = cls(replies=list(replies))
        server = await asyncio.start_server(bad._serve, "127.0.0.1", 0)
        bad.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        try:
            yield bad
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode(), reader, writer)
        except asyncio.IncompleteReadError:
            pass  # the client closed the connection between two requests
        except ConnectionError:
            self.num_broken += 1
        finally:
            writer.close()

    async def _answer(
        self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        first, *lines = head.strip().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.requests.append({"path": first.split()[1], "headers": headers, "body": body})
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        data = b"" if reply.body is None else json.dumps(reply.body).encode()
        fields = {**reply.headers, "transfer-encoding": "chunked"}
        writer.write(f"HTTP/1.1 {reply.status} Told\r\n".encode())
        writer.writelines(f"{name}: {value}\r\n".encode() for name, value in fields.items())
        writer.write(b"\r\n")
        for part in [data] * bool(data) + [_event(event) for event in reply.events]:
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
        if reply.end == CUT:
            raise ConnectionResetError
        if reply.end == HANG and await reader.read(1) == b"":
            raise ConnectionResetError
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@contextmanager
def in_thread(*replies: Reply) -> Iterator[BadServer]:
    """Run such a server on a loop of its own, for tests that have none."""
    started, found = threading.Event(), []
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        async with BadServer.running(*replies) as server:
            found.append(server)
            started.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(60)
    yield found[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(60)
    loop.close()


def _event(data: Any) -> bytes:
    if isinstance(data, bytes):
        return data
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()


def delta(text: str, logprob: float | None = -0.5, **more: Any) -> dict[str, Any]:
    """Return a chat event that adds `text`, one token."""
    item = {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
    logprobs = None if logprob is None else {"content": [item]}
    return {
        "choices": [{"index": 0, "delta": {"content": text, **more}, "logprobs": logprobs}],
        "usage": None,
    }


def called(name: str | None, arguments: str, index: int = 0, *, id_: str = "") -> dict[str, Any]:
    """Return a piece of a call; its first has a name."""
    head = {"id": id_ or f"call_{index + 1}", "type": "function"} if name else {}
    function = {"arguments": arguments} | ({"name": name} if name else {})
    call = {"index": index, **head, "function": function}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}


def finish(reason: str = "stop", **usage: int) -> list[Any]:
    """Return how an answer ends: its reason, its usage, and the end of the stream."""
    events: list[Any] = [{"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}]
    if usage:
        events.append({"choices": [], "usage": usage})
    return [*events, "[DONE]"]


def answer(*texts: str, reason: str = "stop", **usage: int) -> Reply:
    """Return a good answer of these tokens."""
    return Reply(events=[*map(delta, texts), *finish(reason, **usage)])
