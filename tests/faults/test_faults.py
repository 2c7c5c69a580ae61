"""`make test-faults`: kill, stop and starve every part of a server on Ray while clients run.

Clients repeat what fails, as OpenAI's do. Whoever starts the server starts it again where it ended,
as systemd and Kubernetes do. The table that this prints stands in docs/operations.md.
"""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.ports import free_port
from tests.router.ray.server import Server, serving, until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

NUM_CLIENTS = 8
PATIENCE_S = 300.0
LEASE_S = 3.0
BEFORE_S, AFTER_S = 1.5, 2.0
POOL = {
    "engines": [
        {
            "name": "one",
            "kind": "fake",
            "options": {"models": {"alpha": {"token_latency_s": 0.02}}},
            "deployment": {"min_replicas": 2, "max_replicas": 2},
        }
    ],
    "models": [{"name": "alpha", "engine": "one"}],
    "policies": {},
}
CONFIG = {
    "budgets": {"server": {"requests_per_month": 1_000_000}, "lease_s": LEASE_S},
    "ingress": {"min_replicas": 2, "max_replicas": 2},
}


@dataclass(kw_only=True)
class Asked:
    """One request: how often it was sent, and whether it was answered in the end."""

    id: str
    began_s: float
    num_tries: int = 0
    answered_s: float | None = None


class Clients:
    """Clients that ask one request after another until told to end."""

    def __init__(self, url: str) -> None:
        self.asked: list[Asked] = []
        self._url = f"{url}/v1/chat/completions"
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(NUM_CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End when the requests that run are answered."""
        self._end.set()
        for thread in self._threads:
            thread.join()

    def num_answered(self, since_s: float) -> int:
        """Return how many requests were begun and answered since then."""
        return sum(a.began_s >= since_s and a.answered_s is not None for a in list(self.asked))

    def _run(self, number: int) -> None:
        body = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
        while not self._end.is_set():
            asked = Asked(id=f"fault-{number}-{len(self.asked)}", began_s=time.monotonic())
            self.asked.append(asked)
            while time.monotonic() < asked.began_s + PATIENCE_S and asked.answered_s is None:
                asked.num_tries += 1
                with contextlib.suppress(httpx.HTTPError):
                    headers = {"x-request-id": asked.id}
                    answer = httpx.post(self._url, json=body, headers=headers, timeout=15)
                    if answer.status_code == 200:
                        asked.answered_s = time.monotonic()
                        break
                time.sleep(0.2)


def _part(server: Server, name: str) -> psutil.Process:
    """Return a process below the server, by descent: Ray's own titles overwrite what they carry."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in process.name() or name in " ".join(process.cmdline()[:1]):
                return process
    raise AssertionError(f"{name} does not run")


def _kill(name: str) -> Callable[[Server, Path], None]:
    return lambda server, _: _part(server, name).kill()


def _kill_server(server: Server, _: Path) -> None:
    server.process.kill()


def _terminate(server: Server, _: Path) -> None:
    server.process.send_signal(signal.SIGTERM)


def _suspend(server: Server, _: Path) -> None:
    replica = _part(server, "ingress")
    replica.suspend()
    time.sleep(3)
    replica.resume()


def _lock(_: Server, folder: Path) -> None:
    connection = sqlite3.connect(folder / "rows.db", timeout=30, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(3)
    connection.execute("ROLLBACK")
    connection.close()


FAULTS: dict[str, Callable[[Server, Path], None]] = {
    "SIGTERM of the server": _terminate,
    "kill -9 of the server": _kill_server,
    "kill -9 of HAProxy": _kill("haproxy"),
    "kill -9 of the GCS": _kill("gcs_server"),
    "kill -9 of the raylet": _kill("raylet"),
    "kill -9 of an engine's replica": _kill("engine-one"),
    "kill -9 of an ingress replica": _kill("ingress"),
    "SIGSTOP of an ingress replica, 3 s": _suspend,
    "database locked, 3 s": _lock,
}


class Kept:
    """A server that is started again whenever it has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._port = free_port()
        self._stack = contextlib.ExitStack()
        self.server = self._start()

    def keep(self) -> None:
        """Start it again if it has ended."""
        if self.server.process.poll() is not None:
            self._stack.close()
            until(lambda: not self.server.is_listening(), 60)
            self.server = self._start()

    def close(self) -> None:
        """Stop it for good."""
        self._stack.close()

    def _start(self) -> Server:
        return self._stack.enter_context(
            serving(self.folder, port=self._port, config=CONFIG, **POOL)
        )


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    """A running server."""
    running = Kept(tmp_path)
    yield running
    running.close()


def _books(folder: Path) -> tuple[dict[str, int], int]:
    """Return the answered rows by the client's id, and the requests charged; once nothing is held.

    What a killed replica held is given back when its lease ends.
    """
    end = time.monotonic() + 60
    while True:
        with contextlib.closing(sqlite3.connect(folder / "rows.db", timeout=30)) as connection:
            held = connection.execute("SELECT count(*) FROM budget_holds WHERE NOT lapsed")
            if not held.fetchone()[0]:
                charged = connection.execute("SELECT sum(spent_requests) FROM budget_windows")
                rows = connection.execute(
                    "SELECT client_request_id, count(*) FROM requests "
                    "WHERE answered_by IS NOT NULL GROUP BY 1"
                )
                return dict(rows.fetchall()), int(charged.fetchone()[0] or 0)
        assert time.monotonic() < end, "holds are left"
        time.sleep(0.2)


def test_every_part_may_fail(kept: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    """Every request is answered in the end, none is charged twice, few rows are lost."""
    lines, before_charged, before_rows = [], 0, 0
    for name, fault in FAULTS.items():
        clients = Clients(kept.server.url)
        try:
            until(lambda clients=clients: clients.num_answered(0) >= NUM_CLIENTS)
            time.sleep(BEFORE_S)
            fault_s = time.monotonic()
            fault(kept.server, kept.folder)
            time.sleep(AFTER_S)
            end = fault_s + PATIENCE_S
            while clients.num_answered(fault_s) < 4 * NUM_CLIENTS and time.monotonic() < end:
                kept.keep()
                time.sleep(0.1)
            kept.keep()
        finally:
            clients.close()
        rows, charged = _books(kept.folder)
        answered = [asked for asked in clients.asked if asked.answered_s is not None]
        settled_s = time.monotonic() + 10  # rows are written after their answers
        while (lost := sum(asked.id not in rows for asked in answered)) and (
            time.monotonic() < settled_s
        ):
            time.sleep(0.2)
            rows, charged = _books(kept.folder)
        num_charged, num_rows = charged - before_charged, sum(rows.values()) - before_rows
        before_charged, before_rows = charged, sum(rows.values())
        longest_s = max((a.answered_s or 0) - a.began_s for a in answered)
        retried = sum(asked.num_tries > 1 for asked in clients.asked)
        failed = len(clients.asked) - len(answered)
        # A killed replica may have charged a try whose row it still held, and that was repeated.
        unrecorded = max(0, num_charged - num_rows - lost)
        twice = max(0, num_charged - sum(asked.num_tries for asked in clients.asked))
        lines.append(
            f"| {name} | {len(clients.asked)} | {retried} | {failed} | {lost} | "
            f"{unrecorded} | {twice} | {longest_s:.1f} |"
        )
        with capsys.disabled():
            sys.stdout.write(f"{lines[-1]}\n")
        assert failed == 0, name
        assert twice == 0, name
        assert lost + unrecorded <= 2 * NUM_CLIENTS, name
