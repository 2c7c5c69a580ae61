"""A real Prometheus scrapes a real server under traffic: every panel and every rule has data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from router.metrics.families import FAMILIES
from tests.ops.queries import metrics, panel_queries, rules
from tests.ops.served import PROMETHEUS, Prometheus, everything, prometheus, shoal, traffic, wait

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        PROMETHEUS is None, reason="prometheus is not installed (Debian's package prometheus)"
    ),
]

# Only an engine that asks a remote server has a circuit.
NOT_HERE = {"shoal_engine_circuit_open"}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has watched a busy server for a while, and goes on watching."""
    folder = tmp_path_factory.mktemp("ops")
    with shoal(folder, everything()) as url, prometheus(folder, url) as server, traffic(url):
        wait(
            lambda: (
                bool(server.query("shoal_shadow_quality_ratio"))
                and bool(server.query("shoal:error_ratio:rate6h"))
                and bool(server.query('rate(shoal_requests_total{policy="stairs"}[60s]) > 0'))
            ),
            timeout_s=600,
            what="the slowest metrics",
        )
        yield server


def test_every_metric_is_there(scraped: Prometheus) -> None:
    """Each documented metric has at least one series, but for those of remote engines."""
    missing = []
    for family in FAMILIES:
        name = f"{family.name}_bucket" if family.kind == "histogram" else family.name
        if not scraped.query(name) and not name.startswith(
            ("shoal_budget_used", "shoal_budget_rem")
        ):
            missing.append(name)
    assert set(missing) == NOT_HERE


def test_every_panel_has_data(scraped: Prometheus) -> None:
    """No query of a dashboard comes back empty."""
    empty = [query for query in panel_queries() if not scraped.query(query.expression)]
    for query in list(empty):
        # A rate may have just one scrape behind it.
        wait(
            lambda query=query: bool(scraped.query(query.expression)),
            timeout_s=120,
            what=f"{query.dashboard} / {query.panel}: {query.expression}",
        )


def test_every_rule_works(scraped: Prometheus) -> None:
    """Prometheus evaluates all of them without a fault, and what they look at exists."""
    found = scraped.rules()
    assert len(found) == len(rules())
    for rule in found:
        assert rule["health"] == "ok", rule
    for rule in rules():
        if "record" in rule:
            assert scraped.query(rule["record"]), rule["record"]
        for name in metrics(rule["expr"]) - NOT_HERE:
            assert scraped.query(name), name


def test_a_stale_feed_rings(scraped: Prometheus) -> None:
    """The feed here is dead: its alert has begun, and no alert says that the server is down."""
    states = {rule["name"]: rule["state"] for rule in scraped.rules() if rule["type"] == "alerting"}
    assert states["ShoalGridDataStale"] in ("pending", "firing")
    assert states["ShoalDown"] == "inactive"
    assert states["ShoalLedgerDown"] == "inactive"


def test_prometheus_counts_what_was_asked(scraped: Prometheus, tmp_path: Path) -> None:
    """The server's own page and Prometheus agree on a scrape's worth of requests."""
    [target] = httpx.get(f"{scraped.url}/api/v1/targets", timeout=120).json()["data"][
        "activeTargets"
    ]
    assert target["health"] == "up", target["lastError"]
    total = float(scraped.query("sum(shoal_requests_total)")[0]["value"][1])
    models = float(
        scraped.query('sum(shoal_model_requests_total{arm!~"shadow/.*"})')[0]["value"][1]
    )
    refused = float(scraped.query('sum(shoal_requests_total{status="404"})')[0]["value"][1])
    assert 0 < refused < total
    assert models > total - refused, "fused and escalated requests ran for several models"


def test_an_empty_panel_says_why(tmp_path: Path) -> None:
    """Of a server that nobody has asked, each panel has data or tells why there is none."""
    with shoal(tmp_path, {}) as url, prometheus(tmp_path, url) as server:
        # What a counter gained within a minute takes two scrapes.
        twice = "count_over_time(shoal_reports_age_seconds[5m]) >= 2"
        wait(lambda: bool(server.query(twice)), timeout_s=120, what="two scrapes")
        empty = [query for query in panel_queries() if not server.query(query.expression)]
        assert len(empty) > 30
        assert not [query for query in empty if query.if_empty is None]
