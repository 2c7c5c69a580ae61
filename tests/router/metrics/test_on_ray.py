"""The metrics of a real Ray Serve application with two ingress replicas, one of which dies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from router.ledger.database import open_database
from router.ledger.queries import spend
from tests.router.metrics.scrape import samples
from tests.server import Server, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Watched:
    """A server whose pages are read while a replica of its ingress may be dying."""

    server: Server
    http: httpx.Client

    def ask(self, number: int) -> None:
        """Ask so many times; what meets a dying replica may fail."""
        for _ in range(number):
            with contextlib.suppress(httpx.TransportError):
                self.server.ask("auto")

    def page(self) -> str:
        """Return the page of a replica that lives."""
        pages: list[str] = []

        def given() -> bool:
            with contextlib.suppress(httpx.TransportError):
                response = self.http.get("/metrics")
                pages.extend([response.text] if response.status_code == 200 else [])
            return bool(pages)

        until(given)
        return pages[0]

    def counters(self) -> dict[str, float]:
        """Return the counters of one page."""
        found = samples(self.page())
        return {n: v for n, v in found.items() if "_total" in n or "_bucket" in n or "_sum" in n}

    def num_rows(self) -> int:
        """Return how many requests the ledger has."""
        database = open_database(f"sqlite:///{self.server.folder}/rows.db")
        total = sum(group.num_requests for group in spend(database))
        database.dispose()
        return total


def _requests(counters: dict[str, float]) -> float:
    return sum(v for n, v in counters.items() if n.startswith("shoal_requests_total"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Serve scripted models behind two ingress replicas."""
    config = {"ingress": {"min_replicas": 2, "max_replicas": 2}}
    with serving(tmp_path_factory.mktemp("pool"), config=config) as server, server.http as http:
        yield Watched(server, http)


def test_counters_survive_a_killed_replica(served: Watched) -> None:
    """Any replica's page is every replica's page; after a kill -9 nothing falls or counts twice."""
    served.ask(30)
    until(lambda: _requests(served.counters()) == 30)
    pages = [served.counters() for _ in range(8)]
    assert all(page == pages[0] for page in pages)
    [replica, _] = served.server.family("ray::ServeReplica:shoal:ingress")
    replica.kill()
    served.ask(20)
    until(lambda: _requests(served.counters()) == served.num_rows() > 30)
    after = served.counters()
    assert all(after[name] >= value for name, value in pages[0].items())
    until(lambda: "shoal_ingress_replicas 2.0" in served.page())
