"""Clients that send half a request and wait."""

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from router.local import Impatient


def test_half_sent_requests_deny_nobody(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside hundreds of half-sent headers ten of ten requests are served; those are closed."""
    monkeypatch.setattr(Impatient, "head_timeout_s", 1.0)
    server = serve()
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    halves = [socket.create_connection(address, timeout=60) for _ in range(300)]
    try:
        for half in halves:
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-")
        assert [server.post().status_code for _ in range(10)] == [200] * 10
        for half in halves:
            assert half.recv(1) == b"", "closed by the server"
    finally:
        for half in halves:
            half.close()


WHOLE = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "half"),
    [(b"", b"GET /v1/models HTTP/1.0\r\nHost: localhost\r\nX-"), (WHOLE, b"GET /v1/mod")],
    ids=["http-1.0", "after an upgrade"],
)
def test_peculiar_clients_are_not_waited_for_either(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, first: bytes, half: bytes
) -> None:
    """Who speaks an old protocol, or offers another, has no more time for half a head."""
    monkeypatch.setattr(Impatient, "head_timeout_s", 1.0)
    server = serve()
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=60) as client:
        if first:
            client.sendall(first)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(half)
        while client.recv(65536):
            pass
    assert server.post().status_code == 200


def test_a_head_without_end_is_cut_off(serve: Callable[..., Any]) -> None:
    """However fast it comes: what a server has to keep of a head is bounded."""
    server = serve()
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=60) as endless:
        endless.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")
        told = b""
        with suppress(ConnectionError):
            for number in range(100_000):
                endless.sendall(b"x-%d: y\r\n" % number * 100)
        with suppress(ConnectionError):
            told = endless.recv(65536)
        assert told == b"" or b" 431 " in told
    assert server.post().status_code == 200


PATHS = ("/v1/chat/completions", "/v1/messages/count_tokens", "/tokenize", "/v1/feedback")


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_does_not_come_is_not_waited_for(serve: Callable[..., Any], path: str) -> None:
    """Whatever is asked, a body has its time, and then the client is told which."""
    server = serve(limits={"body_timeout_s": 0.2})
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=60) as half:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        half.sendall(head.encode() + b"{")
        told = b""
        while b"(limits.body_timeout_s)" not in told:
            part = half.recv(65536)
            assert part, told
            told += part
        assert told.startswith(b"HTTP/1.1 408")


def test_an_upload_that_stops_is_not_waited_for(serve: Callable[..., Any]) -> None:
    """A file may take its time, but something of it has to come."""
    server = serve(limits={"body_timeout_s": 0.5})
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=60) as half:
        half.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        told = b""
        while b"(limits.body_timeout_s)" not in told:
            part = half.recv(65536)
            assert part, told
            told += part
        assert told.startswith(b"HTTP/1.1 408")
