"""What happens to `shoal serve` when it is told to stop, when parts of it die, and under siege."""

import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.router.ray.server import Server, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

# 40 tokens take four seconds.
SLOW = {"answers": ["x" * 40], "token_latency_s": 0.1}
POOL = {
    "engines": [{"name": "one", "kind": "fake", "options": {"models": {"beta": SLOW}}}],
    "models": [{"name": "alpha", "engine": "one"}, {"name": "beta", "engine": "one"}],
}
RECOVERY_S = 10


def _ask_slowly(server: Server, stream: bool) -> str:
    """Return how a request of four seconds ended."""
    response = server.ask("beta", stream=stream, max_tokens=40)
    if stream:
        return "whole" if "[DONE]" in response.text and '"error"' not in response.text else "cut"
    return "whole" if response.status_code == 200 else str(response.status_code)


@pytest.mark.parametrize("arguments", [(), ("--local",)], ids=["ray", "local"])
def test_sigterm_finishes_what_runs(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Running requests are answered whole, new ones find nobody, and the exit code is 0."""
    with (
        serving(tmp_path, *arguments, **POOL) as server,
        ThreadPoolExecutor(20) as clients,
    ):
        server.ask()
        running = [clients.submit(_ask_slowly, server, bool(i % 2)) for i in range(20)]
        until(lambda: server.num_running() == 20)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not server.is_listening(), 30)
        assert Counter(one.result() for one in running) == {"whole": 20}
        assert server.process.wait(60) == 0
        assert server.family() == []


def test_kill_9_leaves_nothing(tmp_path: Path) -> None:
    """No process outlives a killed server, and the same port serves again at once."""
    with serving(tmp_path, **POOL) as server:
        assert len(server.family()) > 5
        server.process.kill()
        until(lambda: server.family() == [] and not server.is_listening(), RECOVERY_S)
    with serving(tmp_path, **POOL, port=server.port) as again:
        assert again.ask().status_code == 200


@pytest.mark.parametrize("part", ["gcs_server", "raylet/raylet"])
def test_without_its_core_it_ends(tmp_path: Path, part: str) -> None:
    """A server whose Ray lost its core says so and ends, nothing left, instead of hanging."""
    with serving(tmp_path, **POOL) as server:
        server.named(part).kill()
        assert server.process.wait(RECOVERY_S) == 1
        until(lambda: server.family() == [], RECOVERY_S)
    assert f"Ray's {part.partition('/')[0]} has ended" in "".join(server.said)


@pytest.mark.parametrize("part", ["bin/haproxy", "ray::HAProxyManager"])
def test_a_lost_front_comes_back_or_ends(tmp_path: Path, part: str) -> None:
    """Without HAProxy, or what manages it, requests are answered again soon, or the server ends."""
    with serving(tmp_path, **POOL) as server:
        server.named(part).kill()
        started_s = time.monotonic()

        def settled() -> bool:
            if server.process.poll() is not None:
                return True
            try:
                return server.ask().status_code == 200
            except OSError:
                return False

        time.sleep(0.5)
        until(settled, 3 * RECOVERY_S)
        if server.process.poll() is not None:
            assert time.monotonic() - started_s < 2 * RECOVERY_S
            assert server.family() == []


def test_half_sent_requests_deny_nobody(tmp_path: Path) -> None:
    """4,200 connections with half a head each leave room for others, and are closed in time."""
    held: list[socket.socket] = []
    with serving(tmp_path, **POOL) as server:
        try:
            for _ in range(4200):
                one = socket.create_connection(("127.0.0.1", server.port), timeout=30)
                one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-slow: ")
                held.append(one)
            assert [server.ask().status_code for _ in range(10)] == [200] * 10
            held[0].settimeout(60)
            answer = held[0].recv(1000)
            assert answer == b"" or b" 408 " in answer
        finally:
            for one in held:
                one.close()


def test_ports_follow_the_host(tmp_path: Path) -> None:
    """On loopback nobody else reaches anything, but for the ports that the start names."""
    with serving(tmp_path, **POOL) as server:
        server.ask()
        open_ports = {
            (process.name(), connection.laddr.port)
            for process in server.family()
            for connection in process.net_connections("tcp")
            if connection.status == "LISTEN"
            and connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        }
        said = "".join(server.said)
    assert all("Repl" in name for name, _ in open_ports), open_ports
    assert not open_ports or "replicas also listen" in said
