"""A `shoal serve` process on Ray for tests, and what a machine knows of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psutil
import yaml

from router.keeper import VARIABLE
from tests.ports import free_port
from tests.router.conftest import write_pool


def until(condition: Callable[[], bool], within_s: float = 120) -> None:
    """Wait for `condition`."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@dataclass
class Server:
    """A running server; `said` grows with its output."""

    process: subprocess.Popen[str]
    port: int
    said: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def ask(self, model: str = "alpha", **fields: Any) -> httpx.Response:
        """Ask `model` to echo."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)

    def num_running(self) -> int:
        """Return how many requests its engines run."""
        engines = httpx.get(f"{self.url}/health", timeout=60).json()["engines"]
        return sum(engine["running_requests"] for engine in engines.values())

    def family(self) -> list[psutil.Process]:
        """Return its processes: all that carry its name, itself left out."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                name = process.environ().get(VARIABLE, "")
                if name.startswith(f"{self.process.pid}:") and process.status() != "zombie":
                    found.append(process)
        return found

    def named(self, part: str) -> psutil.Process:
        """Return its process whose command line holds `part`."""
        return next(p for p in self.family() if part in " ".join(p.cmdline()))

    def is_listening(self) -> bool:
        """Whether anybody has its port."""
        return any(
            c.laddr.port == self.port for c in psutil.net_connections() if c.status == "LISTEN"
        )


@contextlib.contextmanager
def serving(
    folder: Path,
    *arguments: str,
    port: int | None = None,
    config: Mapping[str, Any] = MappingProxyType({}),
    **pool: Any,
) -> Iterator[Server]:
    """Serve a pool of fake engines from `folder` until the block ends; `config` adds to it."""
    write_pool(folder, **pool)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"pool": ".", "ledger": {"url": "sqlite:///rows.db"}, **config})
    )
    port = port or free_port()
    command = [sys.executable, "-m", "router.cli", "serve", "--config", "config.yaml"]
    with subprocess.Popen(
        [*command, "--port", str(port), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != VARIABLE},
    ) as process:
        server = Server(process, port)
        reading = threading.Thread(target=_read, args=(server,), daemon=True)
        reading.start()
        try:
            until(lambda: process.poll() is not None or "curl" in "".join(server.said), 300)
            assert process.poll() is None, "".join(server.said)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(120)
            reading.join(5)


def _read(server: Server) -> None:
    assert server.process.stdout is not None
    server.said.extend(server.process.stdout)
