"""The metrics of a real Ray Serve application with two ingress replicas, one of which dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from router.ledger.database import open_database
from router.ledger.queries import spend
from tests.ports import free_port
from tests.router.conftest import write_pool
from tests.router.metrics.scrape import samples

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Served:
    """A server process and its ledger."""

    process: subprocess.Popen[str]
    http: httpx.Client
    folder: Path

    def ask(self, number: int) -> None:
        """Ask so many times; what meets a dying replica may fail."""
        for _ in range(number):
            with contextlib.suppress(httpx.TransportError):
                self.http.post(
                    "/v1/chat/completions",
                    json={"model": "auto", "messages": [{"role": "user", "content": "hello"}]},
                )

    def page(self) -> str:
        """Return the page of a replica that lives."""
        pages: list[str] = []

        def given() -> bool:
            with contextlib.suppress(httpx.TransportError):
                response = self.http.get("/metrics")
                pages.extend([response.text] if response.status_code == 200 else [])
            return bool(pages)

        _wait(given, "a replica gives its page")
        return pages[0]

    def counters(self) -> dict[str, float]:
        """Return the counters of one page."""
        found = samples(self.page())
        return {n: v for n, v in found.items() if "_total" in n or "_bucket" in n or "_sum" in n}

    def num_rows(self) -> int:
        """Return how many requests the ledger has."""
        database = open_database(f"sqlite:///{self.folder}/rows.db")
        total = sum(group.num_requests for group in spend(database))
        database.dispose()
        return total

    def kill_ingress(self) -> None:
        """Kill -9 one ingress replica."""
        found = [
            int(entry.parent.name)
            for entry in Path("/proc").glob("[0-9]*/cmdline")
            if b"ray::ServeReplica:shoal:ingress" in _read(entry)
            and os.getsid(int(entry.parent.name)) == os.getsid(self.process.pid)
        ]
        assert len(found) == 2
        os.kill(found[0], signal.SIGKILL)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _requests(counters: dict[str, float]) -> float:
    return sum(v for n, v in counters.items() if n.startswith("shoal_requests_total"))


def _wait(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.5)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve scripted models behind two ingress replicas."""
    folder = tmp_path_factory.mktemp("pool")
    write_pool(folder)
    config = {
        "pool": ".",
        "ledger": {"url": f"sqlite:///{folder}/rows.db"},
        "ingress": {"min_replicas": 2, "max_replicas": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [sys.executable, "-m", "router.cli", "serve", "--config", "config.yaml"]
    with subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            said = ""
            for line in process.stdout:
                said += line
                if "Ready at" in line:
                    break
            assert "Ready at" in said, said
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
                yield Served(process, http, folder)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(180)


def test_counters_survive_a_killed_replica(served: Served) -> None:
    """Any replica's page is every replica's page; after a kill -9 nothing falls or counts twice."""
    served.ask(30)
    _wait(lambda: _requests(served.counters()) == 30, "30 requests counted")
    pages = [served.counters() for _ in range(8)]
    assert all(page == pages[0] for page in pages)
    served.kill_ingress()
    served.ask(20)
    _wait(lambda: _requests(served.counters()) == served.num_rows() > 30, "counters equal rows")
    after = served.counters()
    assert all(after[name] >= value for name, value in pages[0].items())
    _wait(lambda: "shoal_ingress_replicas 2.0" in served.page(), "the replica is replaced")
