"""Shared sums: exact for any number of writers, whatever happens to them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from router.ledger.database import Database, open_database
from router.ledger.queries import requests
from router.ledger.writer import Ledger, prune
from router.metrics import families as f
from router.metrics.counting import Store
from tests.router.ledger.records import record

NewLedger = Callable[..., Ledger]
ANSWERED = f.REQUESTS.series("learned", "none", "200")


def test_replicas_add_up_exactly(database: Database, new_ledger: NewLedger) -> None:
    """Four ledgers write 60 rows each at once, every tenth row twice; each row counts once."""

    def replica(number: int) -> None:
        # On connections of its own: who closes first would drop those that others have in use.
        ledger = new_ledger(flush_interval_s=0.01)
        for index in range(60):
            ledger.record(record(1000 * number + index))
            if index % 10 == 0:
                ledger.record(record(1000 * number + index))
            if index % 20 == 0:
                asyncio.run(ledger.flush())
        asyncio.run(ledger.close())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(replica, range(4)))
    found = Store(database).counters()
    assert found[ANSWERED] == 240
    assert found[f.TOKENS.series("math", "learned", "none", "output")] == 20 * 240
    buckets = [v for s, v in found.items() if s[0] == f.DURATION_S.name and s[2] != "sum"]
    assert sum(buckets) == 240


def test_pruning_takes_nothing_away(database: Database, new_ledger: NewLedger) -> None:
    """Counters keep what rows said that are long deleted."""
    ledger = new_ledger()
    for number in range(20):
        ledger.record(record(number))
    asyncio.run(ledger.flush())
    before = Store(database).counters()
    assert prune(database, before_s=2e9) == 20
    assert Store(database).counters() == before
    assert before[ANSWERED] == 20


def test_rows_and_counters_die_together(ledger_url: str) -> None:
    """After SIGKILL in the middle of writing, the counters say what the rows say."""
    script = str(Path(__file__).parents[1] / "ledger" / "killed.py")
    process = subprocess.Popen(
        [sys.executable, script, ledger_url, "0.01"],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert process.stdout is not None
    database = open_database(ledger_url)
    while not list(requests(database)):
        assert process.stdout.readline()
    process.kill()
    process.stdout.read()
    process.wait()
    process.stdout.close()
    num_rows = len(list(requests(database)))
    counted = Store(database).counters()[ANSWERED]
    database.dispose()
    assert counted == num_rows > 0


def test_a_row_that_cannot_be_counted_is_still_kept(
    database: Database, new_ledger: NewLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the metrics costs figures, never rows."""

    def broken(rows: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("router.metrics.counting.tally", broken)
    ledger = new_ledger()
    ledger.record(record(1))
    asyncio.run(ledger.flush())
    assert len(list(requests(database))) == 1
    assert Store(database).counters() == {}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    database = open_database(f"sqlite:///{tmp_path / 'store.db'}")
    yield Store(database)
    database.dispose()


def test_snapshots_replace_and_age(store: Store) -> None:
    """A holder's last word counts; counts that come with it add up; the old is forgotten."""
    gauge, counter = f.ENGINE_UP.series("one"), f.DROPPED_ROWS.series()
    store.publish("a", {gauge: 1.0}, now_s=100, counts={counter: 2.0})
    store.publish("a", {gauge: 0.0}, now_s=110, counts={counter: 3.0})
    store.publish("b", {gauge: 1.0}, now_s=90)
    assert store.counters()[counter] == 5
    found = {snapshot.holder: snapshot for snapshot in store.snapshots(since_s=95)}
    assert set(found) == {"a"}
    assert (found["a"].time_s, dict(found["a"].gauges)) == (110, {gauge: 0.0})
    store.forget(before_s=105)
    assert [snapshot.holder for snapshot in store.snapshots(since_s=0)] == ["a"]
    store.forget(before_s=0, holder="a")
    assert store.snapshots(since_s=0) == []


def test_one_claims_for_all(store: Store) -> None:
    """Work that is due goes to whoever asks first, and is due again after the interval."""
    assert store.claim("reports", now_s=1000, every_s=10)
    assert not store.claim("reports", now_s=1005, every_s=10)
    store.publish("reports", {f.REPORTS_AGE_S.series(): 1.0}, now_s=1006)
    assert not store.claim("reports", now_s=1015, every_s=10)
    assert store.claim("reports", now_s=1016, every_s=10)
    [kept] = store.snapshots(since_s=0)
    assert dict(kept.gauges) == {f.REPORTS_AGE_S.series(): 1.0}, "claiming keeps the last figures"
