"""`shoal serve` as a process: it says when it is ready, and refuses what cannot work."""

import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.router.conftest import write_pool
from tests.server import serving, until

SHOAL = (sys.executable, "-m", "router.cli", "serve")


def _refused(folder: Path, *arguments: str) -> str:
    """Run a command that must be refused with one line and code 2; return the line."""
    done = subprocess.run(
        [*SHOAL, *arguments], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    [line] = done.stderr.splitlines()
    return line


def test_bad_pools_and_configurations_are_refused(tmp_path: Path) -> None:
    """A missing pool, a wrong value and an unknown key are each told in one line."""
    assert "there is no pool file" in _refused(tmp_path, "--pool", "nowhere")
    write_pool(tmp_path, policies={"auto": {"kind": "fixed", "plan": "nobody"}})
    named = _refused(tmp_path, "--pool", ".", "--local")
    assert "policies.auto" in named
    assert "'nobody'" in named
    (tmp_path / "config.yaml").write_text("pool: .\nlimits: {max_body: 3}\n")
    assert "limits.max_body: unknown key" in _refused(tmp_path, "--config", "config.yaml")
    assert "not both" in _refused(tmp_path, "some/folder", "--pool", ".")
    assert "there is no folder or .gguf file" in _refused(tmp_path, "some/folder")


def test_a_stopping_server_says_so_to_whom_it_cannot_wait_for(tmp_path: Path) -> None:
    """As JSON, with when to ask again; a stream is cut off. The log tells of no fault."""
    slow = [{"name": "one", "kind": "fake", "options": {"token_latency_s": 5}}]
    pool: dict[str, Any] = {"models": [{"name": "alpha", "engine": "one"}], "policies": {}}
    config = {"ingress": {"drain_s": 1}}
    fields = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
    with (
        serving(tmp_path, "--local", config=config, engines=slow, **pool) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(1) as thread,
        client.stream("POST", "/v1/chat/completions", json={**fields, "stream": True}) as streamed,
    ):
        assert streamed.status_code == 200
        whole = thread.submit(
            httpx.post, f"{server.url}/v1/chat/completions", json=fields, timeout=60
        )
        until(lambda: _running(client) == 2)
        server.process.send_signal(signal.SIGTERM)
        told = whole.result(60)
        assert (told.status_code, told.json()["error"]["code"]) == (503, "server_stops")
        assert told.headers["retry-after"]
        with pytest.raises(httpx.RemoteProtocolError):
            streamed.read()
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.text


def _running(client: httpx.Client) -> int:
    health = client.get("/health").json()
    return int(health["engines"]["one"]["running_requests"])


def test_a_busy_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """Somebody else's port is a clear error."""
    write_pool(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = _refused(tmp_path, "--pool", ".", "--port", str(port))
    assert f"127.0.0.1:{port} cannot be listened on" in line


@pytest.mark.parametrize(
    ("number", "host"), [(signal.SIGINT, "127.0.0.1"), (signal.SIGTERM, "0.0.0.0")]
)
def test_serves_here_until_it_is_told_to_stop(
    tmp_path: Path, number: signal.Signals, host: str
) -> None:
    """--local answers in one process, keeps its ledger, and ends cleanly on a signal.

    It warns where others than this machine can reach it without a key.
    """
    with serving(tmp_path, "--local", "--host", host) as server:
        assert ("Anybody who reaches" in server.text) == (host == "0.0.0.0")
        assert "engine one (fake): alpha, beta" in server.text
        assert f"Ready at {server.url}/v1" in server.text
        assert server.ask().json()["choices"][0]["message"]["content"] == "hello"
        server.process.send_signal(number)
        assert server.process.wait(60) == 0
        until(lambda: server.text.splitlines()[-1] == "Stopped.")
    assert (tmp_path / "rows.db").is_file()
