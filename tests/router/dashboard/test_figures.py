"""The page's figures against what the ledger holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa

from policies.evaluation.metrics import wilson_interval
from router.access.limits import read_caps
from router.dashboard.figures import (
    OWN_PLAN,
    WINDOWS,
    Figures,
    choices,
    spending,
    spent_of_caps,
)
from router.ledger.database import Database, writing
from router.ledger.feedback import Feedback, add_feedback
from router.ledger.schema import BUDGET_WINDOWS
from router.ledger.writer import Ledger
from router.record import SHADOW, MemberTokens
from tests.router.ledger.records import record

NewLedger = Callable[..., Ledger]
NOW_S = 1_800_000_005.0
ONE = {"math": MemberTokens(prompt_tokens=10, output_tokens=20)}


def _spending(database: Database, name: str = "15m", now_s: float = NOW_S) -> dict[str, Any]:
    with database.connect() as connection:
        return spending(connection, WINDOWS[name], now_s=now_s)


def test_every_window_is_cut_into_whole_buckets_that_end_now() -> None:
    """The buckets tile the window, and the last one holds the present moment."""
    for window in WINDOWS.values():
        starts_s = window.starts_s(NOW_S)
        assert len(starts_s) * window.bucket_s == window.length_s
        assert starts_s[-1] <= NOW_S < starts_s[-1] + window.bucket_s
        assert {b - a for a, b in pairwise(starts_s)} == {window.bucket_s}


def test_totals_are_the_sum_of_the_series(database: Database, new_ledger: NewLedger) -> None:
    """Requests land in the bucket of their arrival; older ones and shadows are not among them."""
    ledger = new_ledger()
    ledger.record(record(1, time_s=NOW_S - 2000, usd=9.0))
    ledger.record(record(2, time_s=NOW_S - 100, usd=1.0, latency_s=1.0, ttft_s=0.5))
    ledger.record(record(3, time_s=NOW_S - 1, usd=2.0, latency_s=3.0, ttft_s=None))
    ledger.record(record(4, time_s=NOW_S - 1, usd=0.0, status=503, latency_s=9.0))
    ledger.record(record(5, time_s=NOW_S - 1, usd=0.5, status=429, latency_s=9.0))
    ledger.record(record(6, time_s=NOW_S - 1, usd=7.0, endpoint=SHADOW))
    ledger.stop()
    found = _spending(database)
    totals = found["totals"]
    assert (totals["requests"], totals["answered"], totals["failed"]) == (4, 2, 1)
    assert totals["usd"] == 3.5
    assert (totals["latency_s"], totals["ttft_s"]) == (2.0, 0.5), "means over answers"
    assert found["shadows"] == {"requests": 1, "usd": 7.0, "wh": 0.002, "gco2e": 0.0005}
    series = found["series"]
    for name in ("requests", "answered", "failed", "usd", "wh", "gco2e", "output_tokens"):
        assert sum(series[name]) == pytest.approx(totals[name])
    by_time = dict(zip(series["time_s"], series["usd"], strict=True))
    assert by_time[int(NOW_S - 100) // 10 * 10] == 1.0
    assert series["latency_s"].count(None) == len(series["time_s"]) - 2, "no answer, no mean"


def test_an_empty_ledger_has_figures_too(database: Database) -> None:
    """Nothing was spent in every bucket of every window, and nobody was chosen."""
    for name, window in WINDOWS.items():
        found = _spending(database, name)
        assert set(found["series"]["usd"]) == {0.0}
        assert len(found["series"]["usd"]) == window.length_s // window.bucket_s
    with database.connect() as connection:
        assert choices(connection, since_s=0) == []


def test_choices_are_policies_models_and_plans(database: Database, new_ledger: NewLedger) -> None:
    """What decided is a policy, a model the client named, or a plan the request brought."""
    ledger = new_ledger()
    for number in range(3):
        ledger.record(record(number, usd=0.001))
    ledger.record(record(3, members=ONE, usd=0.003))
    ledger.record(record(4, policy=None, model="math", members=ONE))
    ledger.record(record(5, policy=None, model="auto"))
    ledger.record(record(6, policy=None, model="<script>", status=404))
    ledger.record(record(7, endpoint=SHADOW, policy="mirrored"))
    ledger.stop()
    with database.connect() as connection:
        found = choices(connection, since_s=0)
    assert [(choice["kind"], choice["name"], choice["requests"]) for choice in found] == [
        ("policy", "learned", 4),
        *sorted([("model", "math", 1), ("plan", OWN_PLAN, 1)], key=lambda c: _order(found, c[1])),
    ]
    learned = found[0]
    assert learned["usd_per_1000"] == pytest.approx(1.5)
    assert learned["quality"] is None
    assert learned["answered_by"] == [
        {"members": ["code", "math"], "requests": 3},
        {"members": ["math"], "requests": 1},
    ]


def _order(found: list[dict[str, Any]], name: str) -> int:
    return [choice["name"] for choice in found].index(name)


def test_quality_is_the_mean_feedback_with_its_interval(
    database: Database, new_ledger: NewLedger
) -> None:
    """Only rated answers count, over all who answered for one policy."""
    ledger = new_ledger()
    for number in range(4):
        ledger.record(record(number, members=ONE if number % 2 else {}))
    ledger.stop()
    for number, score in enumerate((1.0, 1.0, 0.4)):
        add_feedback(database, Feedback(request_id=f"req-{number}", time_s=1.0, score=score))
    with database.connect() as connection:
        [choice] = choices(connection, since_s=0)
    low, high = wilson_interval(2.4, 3)
    assert choice["quality"] == {
        "mean": pytest.approx(0.8),
        "low": pytest.approx(low),
        "high": pytest.approx(high),
        "num_rated": 3,
    }


def test_caps_show_what_is_spent_in_the_open_window(database: Database) -> None:
    """A cap without a row is unspent; one with a row shows its own resource, in its own unit."""
    caps = read_caps({"usd_per_day": 5, "tokens_per_hour": 1000}, "budgets.server")
    day_s = int(NOW_S // 86400) * 86400
    row = {column.name: 0 for column in BUDGET_WINDOWS.columns}
    row |= {"window_id": f"server|day|{day_s}", "end_s": day_s + 86400, "spent_nano_usd": 2 * 10**9}
    with writing(database) as connection:
        connection.execute(sa.insert(BUDGET_WINDOWS).values(**row))
    with database.connect() as connection:
        usd, tokens = spent_of_caps(connection, caps, now_s=NOW_S)
    assert usd == {
        "name": "usd_per_day",
        "resource": "usd",
        "spent": 2.0,
        "limit": 5.0,
        "ends_s": day_s + 86400,
    }
    assert (tokens["name"], tokens["spent"], tokens["limit"]) == ("tokens_per_hour", 0, 1000)


def test_figures_are_kept_while_they_are_fresh(database: Database, new_ledger: NewLedger) -> None:
    """Pages that ask at once share one query; later the figures are new."""
    now = [NOW_S]
    ledger = new_ledger()
    ledger.record(record(1, time_s=NOW_S - 5))
    ledger.stop()

    async def ask() -> list[float]:
        figures = Figures(database, tuple, clock=lambda: now[0])
        first, second = await asyncio.gather(figures.of("15m"), figures.of("15m"))
        assert first is second
        with writing(database) as connection:
            connection.exec_driver_sql("DELETE FROM requests")
        seen = [(await figures.of("15m"))["totals"]["requests"]]
        now[0] += 3600  # the slower the query was, the longer are they kept
        return [*seen, (await figures.of("15m"))["totals"]["requests"]]

    assert asyncio.run(ask()) == [1, 0]
