"""`shoal serve` as a process of its own, for every test and benchmark that wants one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import httpx

from router.keeper import VARIABLE
from router.ports import free_port

# The environment of the client libraries lacks psutil and what the router's fixtures import.
if TYPE_CHECKING:
    import psutil


def until(condition: Callable[[], bool], within_s: float = 120, *, every_s: float = 0.05) -> None:
    """Wait for `condition`, which is looked at `every_s`."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every_s)


@dataclass
class Server:
    """A running server; `said` grows with its output."""

    process: subprocess.Popen[str]
    port: int
    folder: Path
    said: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def http(self) -> httpx.Client:
        """A client of the server."""
        return httpx.Client(base_url=self.url, timeout=120)

    @property
    def text(self) -> str:
        """All that it has said."""
        return "".join(self.said)

    def ask(self, model: str = "alpha", **fields: Any) -> httpx.Response:
        """Ask `model` to echo."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **fields}
        with self.http as http:
            return http.post("/v1/chat/completions", json=body)

    def engines(self) -> dict[str, Any]:
        """Return what the engines' replicas say of themselves."""
        with self.http as http:
            return dict(http.get("/health").json()["engines"])

    def family(self, part: str = "") -> list[psutil.Process]:
        """Return the processes below it, by descent, whose command lines hold `part`."""
        import psutil

        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def started(
    folder: Path,
    *arguments: str,
    port: int | None = None,
    python: str | Path = sys.executable,
    env: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Server]:
    """Run `shoal serve` in `folder` from when it is ready until the block ends; `env` adds."""
    port = port or free_port()
    command: Sequence[str] = [str(python), "-m", "router.cli", "serve", "--port", str(port)]
    with subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != VARIABLE} | dict(env),
    ) as process:
        server = Server(process, port, folder)
        reading = threading.Thread(target=_read, args=(server,), daemon=True)
        reading.start()
        try:
            until(lambda: process.poll() is not None or "curl" in server.text, 900)
            assert process.poll() is None, server.text
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(180)
            reading.join(5)


def _read(server: Server) -> None:
    assert server.process.stdout is not None
    server.said.extend(server.process.stdout)


@contextlib.contextmanager
def serving(
    folder: Path,
    *arguments: str,
    port: int | None = None,
    config: Mapping[str, Any] = MappingProxyType({}),
    env: Mapping[str, str] = MappingProxyType({}),
    **pool: Any,
) -> Iterator[Server]:
    """Serve a pool of fake engines from `folder` until the block ends.

    `config` and `env` add to the server's.
    """
    import yaml

    from tests.router.conftest import write_pool

    write_pool(folder, **pool)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"pool": ".", "ledger": {"url": "sqlite:///rows.db"}, **config})
    )
    with started(folder, "--config", "config.yaml", *arguments, port=port, env=env) as server:
        yield server
