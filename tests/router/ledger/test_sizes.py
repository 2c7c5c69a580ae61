"""How large the ledger grows, whatever is sent."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from router.ledger.database import Database
from router.ledger.queries import requests
from router.ledger.schema import METRIC_COUNTERS, REQUESTS
from router.ledger.writer import Ledger, keep_within
from router.record import RequestRecord
from tests.router.ledger.records import record


def test_refused_requests_are_counted_and_few_leave_a_row(
    database: Database, new_ledger: Callable[..., Ledger]
) -> None:
    """Of a flood of refusals a minute's share is written, all are counted; others are all kept."""
    ledger = new_ledger(refused_rows_per_minute=5)
    for i in range(300):
        ledger.record(
            RequestRecord(request_id=f"refused-{i}", time_s=i, endpoint="/v1/x", status=401)
        )
        ledger.record(
            RequestRecord(request_id=f"failed-{i}", time_s=i, endpoint="/v1/x", status=500)
        )
    asyncio.run(ledger.flush())
    rows = [row["status"] for row in requests(database)]
    assert rows.count(500) == 300
    assert 5 <= rows.count(401) <= 10, "a minute may end meanwhile"
    with database.connect() as connection:
        rows_of_counters = connection.execute(sa.select(METRIC_COUNTERS)).all()
    [counted] = [value for series, value in rows_of_counters if '"401"' in series]
    assert counted == 300


def test_a_row_is_bounded_and_takes_any_number(
    database: Database, new_ledger: Callable[..., Ledger]
) -> None:
    """Names of any length, numbers past 64 bits and not-numbers are kept as columns hold them."""
    ledger = new_ledger()
    ledger.record(
        RequestRecord(
            request_id="a", time_s=1.0, endpoint="/v1/x", status=500, model="m" * 4_000_000,
            session="\ud800" * 500, prompt_tokens=2**70, usd=float("nan"), ttft_s=float("inf"),
            scores={"x" * 1000: float("nan")}, query_text="q" * 1000,
        )
    )  # fmt: skip
    asyncio.run(ledger.flush())
    [row] = requests(database)
    assert row["model"] == "m" * 200
    assert len(row["session"]) == 200
    assert row["prompt_tokens"] == 2**63 - 1
    assert row["usd"] == 0.0
    assert row["scores"] == {"x" * 200: 0.0}
    assert row["query_text"] == "q" * 1000
    assert ledger.dropped_rows == 0


def test_the_oldest_rows_go_when_all_take_too_much(
    database: Database, new_ledger: Callable[..., Ledger], caplog: pytest.LogCaptureFixture
) -> None:
    """Above the budget the oldest go until about nine tenths of it are used; below it none do."""
    ledger = new_ledger()
    for i in range(2000):
        ledger.record(record(i))
    asyncio.run(ledger.flush())
    assert keep_within(database, 1e9) == 0
    before = [row["time_s"] for row in requests(database)]
    assert keep_within(database, 300_000) > 0
    after = [row["time_s"] for row in requests(database)]
    assert 0 < len(after) < len(before)
    assert after == before[-len(after) :]


def test_batches_of_any_size_need_few_statements(new_ledger: Callable[..., Ledger]) -> None:
    """What a connection keeps compiled does not grow with the sizes that batches have had.

    And who writes one batch after another uses one connection, so that the others keep nothing.
    """
    parameters, connections = dict[str, int](), set[int]()

    def note(connection: sa.Connection, _: object, said: str, values: Any, *__: object) -> None:
        if said.startswith("INSERT INTO requests"):
            parameters[said] = len(values)
            connections.add(id(connection.connection.dbapi_connection))

    ledger = new_ledger()
    sa.event.listen(ledger.database.engine, "before_cursor_execute", note)
    several = [ledger.database.connect() for _ in range(4)]
    for one in several:
        one.close()  # and is idle from now on

    async def write() -> None:
        for size in range(1, 61):
            for number in range(size):
                ledger.record(record(100 * size + number))
            await ledger.flush()

    asyncio.run(write())
    num_rows = [count // len(REQUESTS.columns) for count in parameters.values()]
    assert len(num_rows) > 1
    assert sum(num_rows) < 64
    assert len(connections) == 1
