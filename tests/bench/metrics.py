"""What metrics cost: a request, the ledger's thread, and a scrape, in CPU time.

On the request's path they add only what each member cost to the record. Everything else happens on
the ledger's thread: `tally` reads a row, and the flush that writes the rows adds its sums in the
same transaction, so that its cost is shared by the requests of a flush.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from policies.footprint import Cost, Footprint
from router.ledger.database import open_database, writing
from router.ledger.schema import REQUESTS
from router.ledger.writer import insert_new, row_of
from router.metrics.counting import Store, add_counts, tally
from router.metrics.page import exposition
from router.record import MemberTokens, RequestRecord

_TARGET_US = 50.0
_NUM_MEMBERS = 4


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Measure; four members per request, a cascade of two stages."""
    rounds = 20 if quick else 100
    parts = {f"m{i}": Footprint(usd=1e-5, wh=1e-4, gco2e=1e-5) for i in range(_NUM_MEMBERS)}
    path_us = _median_us(lambda: _costs(parts), rounds * 50)
    yield {
        "name": "metrics on the request's path: what four members cost, into the record",
        "unit": "µs of CPU",
        "measured": round(path_us, 2),
        "target": _TARGET_US,
        "ok": path_us <= _TARGET_US,
    }
    rows = [_row(number) for number in range(100)]
    yield {
        "name": "metrics on the ledger's thread: one row read",
        "unit": "µs of CPU",
        "measured": round(_median_us(lambda: tally(rows), rounds) / len(rows), 1),
    }
    for num_rows in (1, 20, 200):
        with_us, without_us = _flush_us(num_rows, rounds)
        yield {
            "name": f"metrics in a flush of {num_rows} rows, per row; beside the rows alone",
            "unit": "µs of CPU",
            "ours": round(with_us / num_rows, 1),
            "other": round(without_us / num_rows, 1),
            "measured": round((with_us - without_us) / num_rows, 1),
        }
    yield _scrape(rounds)


def _costs(parts: dict[str, Footprint]) -> dict[str, Cost]:
    return {name: part.cost for name, part in parts.items()}


def _row(number: int) -> dict[str, Any]:
    names = [f"m{i}" for i in range(_NUM_MEMBERS)]
    return row_of(
        RequestRecord(
            request_id=f"req-{time.perf_counter_ns()}-{number}",
            time_s=1.8e9,
            endpoint="/v1/chat/completions",
            model="auto",
            policy="auto",
            status=200,
            stream=True,
            latency_s=0.2 + number / 1000,
            ttft_s=0.05,
            plan={"cascade": {"stages": ["m0", "m1"], "thresholds": [0.5]}},
            prompt_tokens=100,
            output_tokens=50,
            num_choices=1,
            members=dict.fromkeys(names, MemberTokens(prompt_tokens=100, output_tokens=50)),
            costs=dict.fromkeys(names, Cost(usd=1e-5, wh=1e-4, gco2e=1e-5, method="x")),
            scores=dict.fromkeys(names, 0.8),
            stages=(
                {"path": "", "combinator": "cascade", "outcome": "ok"},
                {"path": "0", "outcome": "rejected", "members": names[:1]},
                {"path": "1", "outcome": "ok", "members": names},
            ),
        )
    )


def _flush_us(num_rows: int, rounds: int) -> tuple[float, float]:
    """Return the CPU time of a flush with and without counting, in turn on one database."""
    times: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        database = open_database(f"sqlite:///{folder}/ledger.db")
        for _ in range(max(5, rounds // 4)):
            for counted, seconds in zip((True, False), times, strict=True):
                rows = [_row(number) for number in range(num_rows)]
                started_s = time.process_time()
                with writing(database) as connection:
                    insert = insert_new(connection, REQUESTS)
                    if counted:
                        connection.execute(insert.returning(REQUESTS.c.request_id), rows).all()
                        add_counts(connection, tally(rows))
                    else:
                        connection.execute(insert, rows)
                seconds.append(time.process_time() - started_s)
        database.dispose()
    with_s, without_s = (statistics.median(seconds) for seconds in times)
    return with_s * 1e6, without_s * 1e6


def _scrape(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        database = open_database(f"sqlite:///{Path(folder) / 'ledger.db'}")
        rows = [_row(number) for number in range(100)]
        for number, row in enumerate(rows):
            row["policy"], row["arm"] = f"policy-{number % 10}", f"arm-{number % 5}"
        with writing(database) as connection:
            add_counts(connection, tally(rows))
        store = Store(database)
        num_series = len(store.counters())
        page_us = _median_us(lambda: exposition(store.counters(), accept=""), rounds)
        database.dispose()
    return {
        "name": f"a scrape of {num_series} stored series",
        "unit": "ms of CPU",
        "measured": round(page_us / 1000, 2),
    }


def _median_us(work: Callable[[], object], rounds: int) -> float:
    """Return the median CPU time of one call, in microseconds."""
    batch = 50 if rounds >= 1000 else 1
    seconds = []
    for _ in range(max(5, rounds // batch)):
        started_s = time.process_time()
        for _ in range(batch):
            work()
        seconds.append((time.process_time() - started_s) / batch)
    return statistics.median(seconds) * 1e6


if __name__ == "__main__":
    import json
    import sys

    for row in run("--quick" in sys.argv):
        print(json.dumps(row, ensure_ascii=False))
