"""A client that hangs up frees what its request held, and is still counted."""

import asyncio
import json
import socket
from typing import Any

import pytest

# Longer than any test waits: who frees its lanes has cancelled it.
SLOW = {"answers": ["x" * 1000], "token_latency_s": 0.2}
ENGINES = [{"name": "one", "kind": "fake", "options": SLOW}, {"name": "two", "kind": "fake"}]
NESTED = {"best": {"candidates": ["alpha", {"cascade": {"stages": ["beta"], "thresholds": []}}]}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("plan", ["alpha", NESTED])
def test_hanging_up_frees_every_lane(serve: Any, stream: bool, plan: Any) -> None:
    """Lanes are free shortly after, and the one record holds the tokens generated until then."""
    server = serve(engines=ENGINES)
    body = {"stream": stream, "n": 2, "shoal": {"plan": plan}}
    connection = _post(server.url, body)
    lanes = 2 if plan == "alpha" else 4
    server.wait(lambda: _stats(server)["active_lanes"] == lanes)
    server.wait(lambda: _stats(server)["generated_tokens_total"] > 2 * lanes)
    connection.close()
    server.wait(lambda: _stats(server)["active_lanes"] == 0)
    record = server.last_record()
    assert (record.status, record.num_choices) == (499, 2)
    settled = sum(tokens.output_tokens for tokens in record.members.values())
    assert settled == _stats(server)["generated_tokens_total"]
    assert record.usd > 0
    server.settle()
    assert server.ledger.records == []


def test_hanging_up_while_waiting_in_the_queue(serve: Any) -> None:
    """A request that waits for its turn leaves the queue with its client."""
    one = {**ENGINES[0], "options": {**SLOW, "max_running_requests": 1}}
    server = serve(engines=[one, ENGINES[1]])
    first = _post(server.url, {})
    server.wait(lambda: _stats(server)["running_requests"] == 1)
    second = _post(server.url, {})
    server.wait(lambda: _stats(server)["queued_requests"] == 1)
    second.close()
    server.wait(lambda: _stats(server)["queued_requests"] == 0)
    assert _stats(server)["running_requests"] == 1
    first.close()
    server.wait(lambda: _stats(server)["running_requests"] == 0)


def _post(url: str, body: dict[str, Any]) -> socket.socket:
    """Send a chat request on a bare connection and return it, the response unread."""
    content = {"model": "alpha", "messages": [{"role": "user", "content": "x"}], **body}
    data = json.dumps(content).encode()
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    return connection


def _stats(server: Any) -> dict[str, Any]:
    return dict(server.http.get("/health").json()["engines"]["one"])


def test_a_stream_that_nobody_begins_to_read_is_counted(serve: Any) -> None:
    """A client that is gone, or a server that stops, when an answer's head is to be sent."""
    server = serve(engines=ENGINES)
    content = {"model": "alpha", "messages": [{"role": "user", "content": "x"}], "stream": True}
    body = {"type": "http.request", "body": json.dumps(content).encode(), "more_body": False}

    async def ask() -> None:
        never = asyncio.Event()
        told = [body]

        async def receive() -> Any:
            if not told:
                await never.wait()
            return told.pop()

        async def send(_: Any) -> None:
            raise OSError("gone")

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
        }
        await server.server.config.app(scope, receive, send)

    asyncio.run_coroutine_threadsafe(ask(), server.loop).result(60)
    server.wait(lambda: _stats(server)["active_lanes"] == 0)
    assert server.last_record().status == 499
