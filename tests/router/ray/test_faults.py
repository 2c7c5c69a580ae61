"""What happens to the requests that run when `shoal serve` is told to stop."""

import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server import Server, runs, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

# 40 tokens take four seconds.
SLOW = {"answers": ["x" * 40], "token_latency_s": 0.1}
POOL = {
    "engines": [{"name": "one", "kind": "fake", "options": {"models": {"beta": SLOW}}}],
    "models": [{"name": "alpha", "engine": "one"}, {"name": "beta", "engine": "one"}],
}


def _ask_slowly(server: Server, stream: bool) -> str:
    """Return how a request of four seconds ended."""
    response = server.ask("beta", stream=stream, max_tokens=40)
    if stream:
        return "whole" if "[DONE]" in response.text and '"error"' not in response.text else "cut"
    return "whole" if response.status_code == 200 else str(response.status_code)


def _ask_on(server: Server) -> bool:
    """Ask over one connection until nobody is there; whether every answer was whole till then."""
    body = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
    with server.http as http:
        while True:
            try:
                if http.post("/v1/chat/completions", json=body).status_code != 200:
                    return False
            except httpx.ConnectError:
                return True
            except httpx.HTTPError:
                return False


def _listens(server: Server) -> bool:
    """Whether anybody has its port."""
    return any(
        c.laddr.port == server.port for c in psutil.net_connections() if c.status == "LISTEN"
    )


@pytest.mark.parametrize("arguments", [(), ("--local",)], ids=["ray", "local"])
def test_sigterm_finishes_what_runs(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Running requests are answered whole, new ones find nobody, and the exit code is 0.

    Behind HAProxy that is so, too, for clients that go on asking over connections that they keep.
    """
    # Four seconds may take many on a busy machine; who waits longer than for these would be cut.
    config = {"ingress": {"drain_s": 30}}
    with (
        serving(tmp_path, *arguments, config=config, **POOL) as server,
        ThreadPoolExecutor(24) as clients,
    ):
        server.ask()
        running = [clients.submit(_ask_slowly, server, bool(i % 2)) for i in range(20)]
        until(lambda: sum(one["running_requests"] for one in server.engines().values()) == 20)
        going_on = [] if arguments else [clients.submit(_ask_on, server) for _ in range(4)]
        family = server.family()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not _listens(server), 30)
        assert Counter(one.result() for one in running) == {"whole": 20}
        assert all(one.result() for one in going_on)
        assert server.process.wait(60) == 0
        until(lambda: not any(map(runs, family)), 10)
