"""Prometheus' format, and the table in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

from router.metrics import families as f
from router.metrics.families import FAMILIES, SUM
from router.metrics.page import exposition
from tests.router.metrics.scrape import samples

ROOT = Path(__file__).parents[3]


def test_histograms_are_cumulative() -> None:
    """Buckets add up to the count, and one of a former version counts in the next larger one."""
    name = f.PER_TOKEN_S.name
    values = {
        (name, "auto", "0.05"): 3.0,
        (name, "auto", "0.06"): 2.0,
        (name, "auto", "inf"): 1.0,
        (name, "auto", SUM): 9.5,
    }
    found = samples(exposition(values, accept="")[0].decode())
    bucket = f'{name}_bucket{{le="%s",policy="auto"}}'
    assert [found[bucket % le] for le in ("0.025", "0.05", "0.075", "2.5", "+Inf")] == [
        0, 3, 5, 5, 6
    ]  # fmt: skip
    assert found[f'{name}_count{{policy="auto"}}'] == 6
    assert found[f'{name}_sum{{policy="auto"}}'] == 9.5


def test_what_it_does_not_know_is_left_out() -> None:
    """Series of another version, or with other labels, spoil no page."""
    values = {
        ("shoal_of_tomorrow_total", "x"): 1.0,
        (f.REQUESTS.name, "auto", "200"): 1.0,
        f.LEDGER_UP.series(): 1.0,
    }
    assert samples(exposition(values, accept="")[0].decode()) == {"shoal_ledger_up": 1.0}


def test_scrapers_choose_the_format() -> None:
    """OpenMetrics where it is asked for, with its counters named as they should be."""
    values = {f.REQUESTS.series("auto", "none", "200"): 2.0}
    page, kind = exposition(values, accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert page.endswith(b"# EOF\n")
    assert b"# TYPE shoal_requests counter" in page
    assert exposition(values, accept="*/*")[1].startswith("text/plain")


def test_the_documentation_lists_every_metric() -> None:
    """docs/metrics.md has the code's names, kinds, labels and meanings, in the code's order."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    listed = [
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)), meaning)
        for name, kind, labels, meaning in re.findall(
            r"^\| `(shoal_\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", text, re.MULTILINE
        )
    ]
    assert listed == [(x.name, x.kind, x.labels, x.help) for x in FAMILIES]


def test_names_are_unique_and_say_their_unit() -> None:
    """Seconds, bytes, money, energy and carbon stand in the names, and labels are few."""
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert len(family.labels) <= 4, family.name
        assert "|" not in family.help
        if "latency" in family.help or family.help.startswith("Time"):
            assert "_seconds" in family.name, family.name
        if "US dollars" in family.help or "money" in family.help.lower():
            assert "_usd" in family.name, family.name
