"""A server on Ray that is started again whenever it has ended, as systemd and Kubernetes would."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

import psutil

from router.ledger.database import Database, open_database
from router.ports import free_port
from tests.faults.clients import ANSWER
from tests.faults.network import Network
from tests.router.ledger.pgserver import Server as PostgreSQL
from tests.server import Server, runs, serving, until

LEASE_S = 3.0
POOL = {
    "engines": [
        {
            "name": "one",
            "kind": "fake",
            "options": {"models": {"alpha": {"answers": [ANSWER], "token_latency_s": 0.05}}},
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

# The kinds of processes by their command lines, and how many of each run.
PARTS = {
    "keeper": (r"router/keeper\.py ", 1),
    "GCS": (r"^\S*/gcs_server ", 1),
    "raylet": (r"^\S*/raylet ", 1),
    "Serve's controller": (r"^ray::ServeController", 1),
    "HAProxy's manager": (r"^ray::HAProxyManager", 1),
    "HAProxy": (r"^\S*haproxy -db ", 1),
    "engine replica": (r"^ray::ServeReplica:shoal:engine-one", 2),
    "ingress replica": (r"^ray::ServeReplica:shoal:ingress", 2),
}


class Kept:
    """The server, its database, and the processes below it."""

    def __init__(
        self, folder: Path, network: Network | None, postgresql: PostgreSQL | None
    ) -> None:
        """Start it in `network`, with its ledger in `folder` or in `postgresql`."""
        self.folder = folder
        self.network = network
        self.postgresql = postgresql
        self.url = postgresql.address if postgresql else f"sqlite:///{folder / 'rows.db'}"
        self._clock = folder / "clock"
        self.set_clock(0)
        self._port = free_port()
        self._stack = contextlib.ExitStack()
        self.server = self._start()
        self.database: Database = open_database(self.url)

    def part(self, kind: str) -> list[psutil.Process]:
        """Return the processes of one kind that run, and do not stand still."""
        return [process for process, line in self._running() if re.search(PARTS[kind][0], line)]

    def set_clock(self, ahead_s: float) -> None:
        """Move the clock that the server's Python processes read; see `clock/`."""
        replacement = self._clock.with_suffix(".new")
        replacement.write_text(str(ahead_s))
        replacement.replace(self._clock)

    def make_whole(self) -> None:
        """Wait until every part runs, and start the server again where it has ended."""
        until(self._is_whole, 300, every_s=0.5)  # to look takes a share of what is waited for

    def close(self) -> None:
        """Stop it for good."""
        self.database.dispose()
        self._stack.close()

    def _is_whole(self) -> bool:
        if self.server.process.poll() is not None:
            self.server = self._start()
        lines = [line for _, line in self._running()]
        return all(
            sum(bool(re.search(pattern, line)) for line in lines) >= number
            for pattern, number in PARTS.values()
        )

    def _running(self) -> list[tuple[psutil.Process, str]]:
        """Return the processes that neither ended nor stand still, and their command lines."""
        found = []
        for process in self.server.family():
            with contextlib.suppress(psutil.Error):
                if process.status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED}:
                    found.append((process, " ".join(process.cmdline())))
        return found

    def _start(self) -> Server:
        config = {**CONFIG, "ledger": {"url": self.url}}
        paths = [str(Path(__file__).parent / "clock"), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "SHOAL_FAULTS_CLOCK": str(self._clock),
        }
        return self._stack.enter_context(
            serving(self.folder, port=self._port, config=config, env=environment, **POOL)
        )


def wait_for_end(kept: Kept, family: list[psutil.Process]) -> float:
    """Return how long the server and all below it took to end."""
    began_s = time.monotonic()
    kept.server.process.wait(60)
    until(lambda: not any(map(runs, family)), 30)
    return time.monotonic() - began_s
