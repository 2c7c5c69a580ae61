"""`GET /metrics` over HTTP: the same from every replica, monotone over restarts, never failing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from router.access.keys import Scope, create_key
from router.ledger.database import open_database
from tests.router.conftest import Running, running
from tests.router.metrics.scrape import samples

CASCADE = {"cascade": {"stages": ["alpha", "gamma"], "thresholds": [0.99]}}
PRICED = {
    "kind": "budgeted",
    "policy": {"kind": "fixed", "plan": "alpha"},
    "targets": [{"resource": "usd", "amount": 1.0}],
}
POLICIES = {
    "auto": {"kind": "fixed", "plan": {"answer": {"members": ["alpha", "beta"]}}},
    "stairs": {"kind": "fixed", "plan": CASCADE},
    "thrifty": PRICED,
}
SCOPES: tuple[Scope, ...] = ("user", "admin")
# What a scrape itself moves, or the time of day.
MOVING = ("shoal_reports_age_seconds", "shoal_budget_elapsed_ratio")


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Return a function that starts one more replica on the same ledger."""
    with ExitStack() as stack:
        yield lambda **app: stack.enter_context(start(tmp_path, **app))


def start(folder: Path, **app: Any) -> Any:
    """Serve two fake engines, with a ledger, a cap and a budgeted policy."""
    ledger = {"url": f"sqlite:///{folder}/shoal.db", "flush_interval_s": 0.01}
    settings = {"ledger": ledger, "budgets": {"server": {"usd_per_month": 5}}, **app}
    return running(folder, app=settings, policies=POLICIES)


def write(server: Running) -> None:
    """Wait until the row of every request is written."""
    server.settle()
    asyncio.run(server.ledger.flush())


def scrape(server: Running) -> dict[str, float]:
    """Return the page's samples, once every row is written."""
    write(server)
    response = server.http.get("/metrics")
    assert response.status_code == 200, response.text
    return samples(response.text)


def steady(page: dict[str, float]) -> dict[str, float]:
    """Return what does not move by itself."""
    return {name: value for name, value in page.items() if not name.startswith(MOVING)}


def test_every_replica_shows_the_sum_of_all(replica: Callable[..., Running]) -> None:
    """Two replicas share the traffic; their pages are equal, and count both."""
    one, two = replica(), replica()
    for server, num_requests in ((one, 3), (two, 2)):
        for _ in range(num_requests):
            server.chat(model="auto")
            list(server.chat(model="policy/stairs", stream=True))
            server.chat(model="policy/thrifty")
        assert server.post(model="nobody").status_code == 404
    for server in (one, two):
        write(server)
        assert server.service.metrics is not None
        server.service.metrics._publish()  # what was published in mid-traffic is replaced
    first, second = scrape(two), scrape(one)
    assert steady(first) == steady(second)
    assert second['shoal_requests_total{arm="none",policy="auto",status="200"}'] == 5
    assert second['shoal_errors_total{type="model_not_found"}'] == 2
    assert second['shoal_plans_total{policy="auto",shape="fused"}'] == 5
    steps = [v for n, v in second.items() if n.startswith("shoal_cascade_escalations_total")]
    assert sum(steps) == 5
    assert second['shoal_cascade_stages_total{policy="stairs",stage="2"}'] == 5
    assert second['shoal_time_to_first_token_seconds_count{policy="stairs"}'] == 5
    assert second['shoal_ensemble_members_sum{policy="auto"}'] == 10
    assert second["shoal_ingress_replicas"] == 2
    assert second['shoal_budget_price_per_usd{policy="thrifty"}'] == 0
    assert second['shoal_budget_used_ratio{period="month",resource="usd",scope="server"}'] > 0
    assert second['shoal_engine_up{engine="two"}'] == 1


def test_counters_go_on_after_a_restart(tmp_path: Path) -> None:
    """Nothing that counts ever falls, whoever comes and goes."""
    with start(tmp_path) as server:
        server.chat(model="auto")
        before = scrape(server)
    with start(tmp_path) as server:
        reborn = scrape(server)
        server.chat(model="auto")
        after = scrape(server)
    counting = [n for n in before if "_total" in n or "_bucket" in n or "_count" in n]
    assert len(counting) > 50
    for name in counting:
        assert before[name] == reborn[name] <= after[name], name
    assert after['shoal_requests_total{arm="none",policy="auto",status="200"}'] == 2
    assert after["shoal_ingress_replicas"] == 1, "the one before has said goodbye"


def test_a_missing_database_leaves_a_page(
    replica: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the ledger is away the page says so, and still shows the engines."""
    server = replica()
    server.chat(model="auto")
    scrape(server)

    def away(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("select", {}, Exception("down"))

    monkeypatch.setattr("router.metrics.counting.Store.counters", away)
    page = samples(server.http.get("/metrics").text)
    assert page["shoal_ledger_up"] == 0
    assert page['shoal_engine_up{engine="one"}'] == 1
    assert not any(name.startswith("shoal_requests_total") for name in page)


def test_admins_only_where_keys_are_required(
    replica: Callable[..., Running], tmp_path: Path
) -> None:
    """A scraper needs an admin's key; nobody else learns what things cost."""
    server = replica(auth={"required": True})
    database = open_database(f"sqlite:///{tmp_path}/shoal.db")
    keys = {scope: create_key(database, name=scope, scope=scope)[1] for scope in SCOPES}
    database.dispose()
    statuses = {
        scope: server.http.get("/metrics", headers={"authorization": f"Bearer {key}"}).status_code
        for scope, key in keys.items()
    }
    assert statuses == {"user": 403, "admin": 200}
    assert server.http.get("/metrics").status_code == 401


def test_labels_do_not_come_from_clients(replica: Callable[..., Running]) -> None:
    """Whatever a client sends as model, user or session, it makes no series of its own."""
    server = replica()
    server.post(model="evil-label", user="evil-label", shoal={"session": "evil-label"})
    server.post(user="evil-label", shoal={"policy": "evil-label"})
    server.post(user="evil-label", shoal={"session": "evil-label"})
    assert "evil-label" not in json.dumps(scrape(server))
