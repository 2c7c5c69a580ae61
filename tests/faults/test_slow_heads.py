"""Thousands of half-sent requests in front of a server on Ray, behind HAProxy."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator

import pytest

from router.haproxy import HEADER_TIMEOUT_S, find_haproxy, most_connections
from tests.server import Server, serving

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning"),
]

NUM_HALVES = 4200
NUM_ASKED = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that may have as many files open as this machine allows; so may this process."""
    if find_haproxy() is None:
        pytest.skip("no HAProxy is installed")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    assert most_connections() > NUM_HALVES, "this machine has too few descriptors for the attack"
    with serving(tmp_path_factory.mktemp("pool")) as server:
        yield server


@pytest.mark.parametrize(
    "half",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        b"",
    ],
    ids=["heads", "bodies", "nothing"],
)
def test_half_sent_requests_deny_nobody(server: Server, half: bytes) -> None:
    """Beside them ten of ten requests are served; heads that never end are closed in time."""
    with contextlib.ExitStack() as stack:
        halves = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            for _ in range(NUM_HALVES)
        ]
        for connection in halves:
            connection.sendall(half)
        assert [server.ask().status_code for _ in range(NUM_ASKED)] == [200] * NUM_ASKED
        if not half.endswith(b"{"):  # a body has more time
            for connection in halves:
                connection.settimeout(6 * HEADER_TIMEOUT_S)
                told = connection.recv(4096)
                assert told == b"" or told.startswith(b"HTTP/1.1 408")
        assert server.ask().status_code == 200
