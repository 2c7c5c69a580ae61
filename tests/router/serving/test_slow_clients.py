"""Clients that send half a request and wait."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from router.local import ImpatientProtocol


def test_half_sent_requests_deny_nobody(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside hundreds of half-sent headers ten of ten requests are served; those are closed."""
    monkeypatch.setattr(ImpatientProtocol, "head_timeout_s", 1.0)
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
