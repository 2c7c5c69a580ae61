"""The durable recorder."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from router.ledger.database import Database, open_database, writing
from router.ledger.queries import requests
from router.ledger.schema import REQUESTS
from router.ledger.writer import Ledger
from router.metrics.counting import count_rows
from router.record import RequestRecord
from tests.router.ledger.records import record

NewLedger = Callable[..., Ledger]


def _wait(condition: Callable[[], bool]) -> None:
    """Wait for what a ledger's thread does."""
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


def test_a_close_writes_everything(database: Database, new_ledger: NewLedger) -> None:
    """Rows recorded just before a graceful stop are all there, however long the interval."""
    ledger = new_ledger(flush_interval_s=60)
    for number in range(1200):
        ledger.record(record(number))
    asyncio.run(ledger.close())
    asyncio.run(ledger.close())
    assert len(list(requests(database))) == 1200
    ledger.record(record(9999))
    assert ledger.dropped_rows == 1, "a closed ledger counts what it cannot take"


def test_a_flush_interval_is_enough(database: Database, new_ledger: NewLedger) -> None:
    """Rows reach the database by themselves after the flush interval."""
    ledger = new_ledger(flush_interval_s=0.05)
    ledger.record(record(1))
    _wait(lambda: bool(list(requests(database))))


def test_a_request_counts_once(database: Database, new_ledger: NewLedger) -> None:
    """A second record with the same id, in the same batch or a later one, changes nothing."""
    ledger = new_ledger()
    ledger.record(record(1, usd=1.0))
    ledger.record(record(1, usd=2.0))
    asyncio.run(ledger.flush())
    ledger.record(record(1, usd=3.0))
    ledger.record(record(2))
    asyncio.run(ledger.flush())
    assert [(row["request_id"], row["usd"]) for row in requests(database)] == [
        ("req-1", 1.0),
        ("req-2", 0.001),
    ]
    assert ledger.dropped_rows == 0


def test_a_killed_process_loses_at_most_the_last_flush(ledger_url: str, database: Database) -> None:
    """After SIGKILL all rows up to some are there, once; it had written them while it recorded."""
    script = str(Path(__file__).with_name("killed.py"))
    process = subprocess.Popen(
        [sys.executable, script, ledger_url, "0.2"],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert process.stdout is not None
    recorded = [process.stdout.readline().strip() for _ in range(500)]
    # The promise: what is recorded now is soon written, however many come after it.
    _wait(lambda: recorded[-1] in _ids(database))
    process.kill()
    process.stdout.read()
    process.wait()
    process.stdout.close()
    written = _ids(database)
    assert written == [f"req-{number}" for number in range(len(written))]
    assert set(recorded) <= set(written)


def _ids(database: Database) -> list[str]:
    return [row["request_id"] for row in requests(database)]


def test_rows_wait_while_the_database_is_down(
    database: Database, new_ledger: NewLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are kept and retried while the database fails, and written when it is back."""
    ledger = new_ledger(flush_interval_s=0.01)
    failures = iter([OperationalError("insert", {}, Exception("down"))] * 2)
    insert = ledger._insert

    def flaky(rows: list[dict[str, object]]) -> None:
        for error in failures:
            raise error
        insert(rows)

    monkeypatch.setattr(ledger, "_insert", flaky)
    monkeypatch.setattr("router.ledger.writer._RETRY_S", (0.01,))
    for number in range(5):
        ledger.record(record(number))
    asyncio.run(ledger.flush())
    assert len(list(requests(database))) == 5
    assert ledger.dropped_rows == 0


def test_a_row_that_the_database_refuses_does_not_take_others_along(
    database: Database, new_ledger: NewLedger, caplog: pytest.LogCaptureFixture
) -> None:
    """One impossible row is dropped and logged without its text; the rest is written."""
    ledger = new_ledger(flush_interval_s=60)
    ledger.record(record(1))
    ledger.record(record(2, model=None, query_text="private"))
    ledger.record(record(3))
    with caplog.at_level(logging.ERROR):
        asyncio.run(ledger.flush())
    assert [row["request_id"] for row in requests(database)] == ["req-1", "req-3"]
    assert ledger.dropped_rows == 1
    assert "req-2" in caplog.text and "private" not in caplog.text


def test_text_that_databases_cannot_store_is_cleaned(
    database: Database, new_ledger: NewLedger
) -> None:
    """NUL characters and half surrogate pairs in client text do not cost a row."""
    ledger = new_ledger()
    ledger.record(record(1, model="a\0b", session="\ud800x", query_text="naïve 模型 🐟"))
    asyncio.run(ledger.flush())
    [row] = requests(database)
    assert (row["model"], row["session"]) == ("ab", "?x")
    assert row["query_text"] == "naïve 模型 🐟"


@pytest.mark.parametrize(("text", "num_kept"), [(None, 10), ("x" * 20_000, 1)])
def test_a_full_queue_drops_the_newest_without_blocking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, num_kept: int
) -> None:
    """With the database locked by others, `record` returns at once, keeps its bound and counts.

    Rows with long texts take the room of many.
    """
    database = open_database(f"sqlite:///{tmp_path / 'x.db'}")
    ledger = Ledger(
        database,
        flush_interval_s=0.001,
        queue_rows=10,
        count=count_rows,
        logger=logging.getLogger("test.full"),
    )
    inserting, insert = threading.Event(), ledger._insert

    def noted(rows: list[dict[str, object]]) -> None:
        inserting.set()
        insert(rows)

    monkeypatch.setattr(ledger, "_insert", noted)
    with writing(database) as connection:
        connection.execute(sa.select(REQUESTS)).all()
        ledger.record(record(0, answer_text=text))
        assert inserting.wait(60)  # the thread waits for the lock with what it took
        # Would one of these wait for the lock as well, they would wait for ever.
        for number in range(1, 101):
            ledger.record(record(number, answer_text=text))
        assert (ledger.pending_rows, ledger.dropped_rows) == (num_kept, 100 - num_kept)
    ledger.stop()
    assert len(list(requests(database))) == num_kept + 1
    database.dispose()


async def test_many_replicas_write_side_by_side(database: Database, new_ledger: NewLedger) -> None:
    """Four ledgers on one database lose and double nothing, duplicates of each other included."""
    ledgers = [new_ledger(flush_interval_s=0.005) for _ in range(4)]

    async def replica(ledger: Ledger, index: int) -> None:
        for number in range(100):
            ledger.record(record(number + 90 * index))
            await asyncio.sleep(0)
        await ledger.close()

    await asyncio.gather(*(replica(ledger, i) for i, ledger in enumerate(ledgers)))
    assert len(list(requests(database))) == 370
    assert [ledger.dropped_rows for ledger in ledgers] == [0] * 4


def test_recording_costs_little(database: Database, new_ledger: NewLedger) -> None:
    """`record` is a queue append: in the best of 20 tries, 20 of them take less than 10 ms."""
    ledger = new_ledger(flush_interval_s=60)
    made: list[RequestRecord] = [record(number) for number in range(400)]
    took_s = []
    for start in range(0, len(made), 20):
        started_s = time.perf_counter()
        for item in made[start : start + 20]:
            ledger.record(item)
        took_s.append(time.perf_counter() - started_s)
    assert min(took_s) < 0.01
