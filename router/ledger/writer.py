"""The ledger: takes records on the event loop, writes them in batches on a thread.

What is promised:

- `record` never blocks and never raises; it costs a queue append.
- A row is committed at most `flush_interval_s` (plus the commit itself) after `record`, so a
  killed process loses no older row. `close` writes everything that is left.
- A request's row is written once, and counted once, in the same transaction: a second record
  with its id changes nothing.
- Of requests that were refused before anything ran only so many a minute leave a row; all are
  counted. Rows have a bounded length, and the oldest go when all take more than `max_gb`.
- While the database cannot be reached rows wait, and are retried until it can. Beyond
  `queue_rows` of them, or what so many of a usual size take, the newest are dropped, counted in
  `dropped_rows` and logged: a gateway that stops answering because its bookkeeping is down would be
  worse, and budgets, which must not leak, don't rely on these rows.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from router.ledger.calls import is_away, reason
from router.ledger.database import Database, writing
from router.ledger.schema import FEEDBACK, FILES, REQUESTS, RESPONSES, SECRETS
from router.record import MOST_CHARACTERS, TEXTS, RequestRecord
from router.workers import Worker

_ROW_BYTES = 4096  # a usual row, while it waits
_STAGE_BYTES = 512
_BATCH_ROWS = 500
_RETRY_S = (0.1, 0.5, 2.0)

# Numbers as a column holds them.
_LEAST, _MOST = -(2**63), 2**63 - 1
_LOOK_S = 60.0  # how often the ledger's size is looked at
_MINUTE_S = 60.0


@dataclass(frozen=True)
class _Counted:
    """A record that leaves no row, but is counted."""

    record: RequestRecord

    @property
    def request_id(self) -> str:
        """Whose it is."""
        return self.record.request_id


_Record: TypeAlias = RequestRecord | _Counted
# What travels to the thread: a row; what to call once everything before it is written; the end.
_Item: TypeAlias = _Record | Callable[[], object] | None

# Must not raise but for the database.
Count: TypeAlias = Callable[[sa.Connection, Sequence[Mapping[str, Any]]], None]


class Ledger:
    """Keeps one row per request in `database`. Start one per process; `close` ends its thread."""

    def __init__(
        self,
        database: Database,
        *,
        flush_interval_s: float = 0.2,
        queue_rows: int = 50_000,
        close_timeout_s: float = 10.0,
        refused_rows_per_minute: int = 60,
        max_gb: float | None = None,
        count: Count,
        logger: logging.Logger,
    ) -> None:
        """Write to `database`; `count` notes new rows, in the transaction that adds them."""
        self.database = database
        self._flush_interval_s = flush_interval_s
        self._queue_rows = queue_rows
        self._close_timeout_s = close_timeout_s
        self._count = count
        self._logger = logger
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._refused_rows_per_minute = refused_rows_per_minute
        self._minute, self._refused_rows = -1, 0
        self._max_gb = max_gb
        self._dropped_rows = 0
        self._held_bytes, self._holding = 0, threading.Lock()
        self._closing = threading.Event()
        self._urgent = threading.Event()
        self.worker = Worker("ledger")
        self._thread = self.worker.start_thread(self._run)

    @property
    def pending_rows(self) -> int:
        """About how many rows wait to be written."""
        return self._items.qsize()

    @property
    def dropped_rows(self) -> int:
        """How many rows found the queue full, or the database refused, since the start."""
        return self._dropped_rows

    def record(self, record: RequestRecord) -> None:
        """Take `record`; neither blocks nor raises."""
        if self._closing.is_set():
            self._drop(1, "it is closed")
            return
        if self._items.qsize() >= self._queue_rows or not self._hold(_num_bytes(record)):
            self._drop(1, "the queue is full")
            return
        sampled = not record.is_refusal or self._samples()
        self._items.put(record if sampled else _Counted(record))

    async def flush(self, *, within_s: float = 60.0) -> None:
        """Return once every row recorded before this call is written, or the time is over."""
        loop, written = asyncio.get_running_loop(), asyncio.Event()
        self._items.put(lambda: loop.call_soon_threadsafe(written.set))
        self._urgent.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s if self._thread.is_alive() else 0):
                await written.wait()

    async def close(self) -> None:
        """Write what is still held and end the thread; idempotent."""
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """Like `close`, for callers without an event loop."""
        if not self._closing.is_set():
            self._closing.set()
            self._items.put(None)
            self._urgent.set()
        self._thread.join(self._close_timeout_s)
        if self._thread.is_alive():
            self._logger.error(
                "ledger: the database did not answer within %g s; about %d rows are lost",
                self._close_timeout_s,
                self.pending_rows,
            )
        self.database.dispose()

    def _hold(self, num_bytes: int) -> bool:
        """Count what waits, if there is room for it: a few large rows take that of many."""
        with self._holding:
            if num_bytes > 0 and self._held_bytes >= self._queue_rows * _ROW_BYTES:
                return False
            self._held_bytes += num_bytes
            return True

    def _samples(self) -> bool:
        """Whether another refused request of this minute leaves a row."""
        minute = int(time.monotonic() / _MINUTE_S)
        if minute != self._minute:
            self._minute, self._refused_rows = minute, 0
        self._refused_rows += 1
        return self._refused_rows <= self._refused_rows_per_minute

    def _run(self) -> None:
        ended, looked_s = False, time.monotonic()
        while not ended:
            batch, flushed, ended = self._take()
            held = sum(_num_bytes(i if isinstance(i, RequestRecord) else i.record) for i in batch)
            self._write(batch)
            self._hold(-held)
            if self._max_gb is not None and time.monotonic() - looked_s > _LOOK_S:
                looked_s = time.monotonic()
                self._keep_within(self._max_gb * 1e9)
            for tell in flushed:
                with suppress(RuntimeError):  # its event loop is closed
                    tell()

    def _take(self) -> tuple[list[_Record], list[Callable[[], object]], bool]:
        """Wait for a first row, then one flush interval or until told to flush, and take all.

        Waking for every row would cost each request a turn of the interpreter's lock.
        """
        batch: list[_Record] = []
        item = self._items.get()
        if isinstance(item, _Record) and self._items.qsize() < _BATCH_ROWS:
            self._urgent.wait(self._flush_interval_s)
        self._urgent.clear()  # before taking: whoever is urgent from here on is heard next time
        while isinstance(item, _Record):
            batch.append(item)
            if len(batch) >= _BATCH_ROWS:
                self._urgent.set()  # somebody may wait behind the rest
                return batch, [], False
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                return batch, [], False
        return batch, [item] if item else [], item is None

    def _write(self, batch: list[_Record]) -> None:
        """Write `batch`, waiting for the database; where it refuses it, only what it refuses."""
        attempt = 0
        while batch:
            try:
                self._insert(batch)
                return
            except Exception as error:
                if is_away(error):
                    if attempt == 0:
                        self._logger.warning("ledger: cannot write, rows wait: %s", reason(error))
                    time.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
                    attempt += 1
                    continue
                if len(batch) == 1:
                    self._drop(1, f"the database refuses {batch[0].request_id}: {reason(error)}")
                    return
            middle = len(batch) // 2
            self._write(batch[:middle])
            batch = batch[middle:]

    def _insert(self, batch: list[_Record]) -> None:
        rows = [row_of(record) for record in batch if isinstance(record, RequestRecord)]
        counted = [row_of(item.record) for item in batch if isinstance(item, _Counted)]
        with writing(self.database) as connection:
            if rows:
                insert = insert_new(connection, REQUESTS).returning(REQUESTS.c.request_id)
                new = connection.execute(insert, rows).scalars()
                # Of several rows with one id the first is kept.
                first = {row["request_id"]: row for row in reversed(rows)}
                counted += [first[request_id] for request_id in new]
            self._count(connection, counted)

    def _keep_within(self, max_bytes: float) -> None:
        """Delete old rows if all take more than `max_bytes`; the next look finds the rest."""
        try:
            num_rows = keep_within(self.database, max_bytes)
        except SQLAlchemyError as error:
            self._logger.warning("ledger: its size is not known now: %s", reason(error))
            return
        if num_rows:
            self._logger.warning(
                "ledger: %d old rows deleted, since all took more than ledger.max_gb", num_rows
            )

    def _drop(self, num_rows: int, reason: str) -> None:
        # One line per doubling: a full queue must not flood the log as well.
        self._dropped_rows += num_rows
        if self._dropped_rows & (self._dropped_rows - 1) == 0:
            self._logger.error("ledger: %d rows dropped: %s", self._dropped_rows, reason)


def insert_new(connection: sa.Connection, table: sa.Table) -> sa.Insert:
    """Return an insert into `table` that leaves rows whose primary key exists as they are."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def installation_secret(database: Database, name: str) -> bytes:
    """Return the random secret called `name` that all servers of this database share; blocks."""
    wanted = sa.select(SECRETS.c.value).where(SECRETS.c.name == name)
    with writing(database) as connection:
        drawn = {"name": name, "value": secrets.token_hex(32)}
        connection.execute(insert_new(connection, SECRETS), drawn)
        return bytes.fromhex(connection.execute(wanted).scalar_one())


def _num_bytes(record: RequestRecord) -> int:
    """Return about how much memory a record takes: it may keep texts, and stages of 128 choices."""
    texts = len(record.query_text or "") + len(record.answer_text or "")
    return _ROW_BYTES // 2 + _STAGE_BYTES * len(record.stages) + texts


def row_of(record: RequestRecord) -> dict[str, Any]:
    """Return the row of the table `requests` that holds `record`, as every database takes it."""
    row = {column.name: _stored(getattr(record, column.name)) for column in REQUESTS.columns}
    return row | {name: _clean(getattr(record, name)) for name in TEXTS if row[name] is not None}


def _stored(value: object) -> Any:  # noqa: ANN401 - whatever a column or JSON holds
    if isinstance(value, str):
        return _clean(value)[:MOST_CHARACTERS]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return max(_LEAST, min(value, _MOST))
    if isinstance(value, float):
        return value if math.isfinite(value) else 0.0
    if is_dataclass(value):
        return _stored(vars(value))
    if isinstance(value, Mapping):
        return {name[:MOST_CHARACTERS]: _stored(part) for name, part in value.items()}
    return [_stored(part) for part in value] if isinstance(value, list | tuple) else value


def _clean(text: str) -> str:
    # PostgreSQL stores neither NUL nor half a surrogate pair, both of which JSON bodies may carry.
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


_PRUNED_PER_TRANSACTION = 5_000
_MOST_PER_LOOK = 20_000
# What rows take beside their columns, for PostgreSQL's headers and indexes.
_OVERHEAD = 1.3
_SAMPLE = 1000


def prune(database: Database, *, before_s: float) -> int:
    """Delete the requests (with their feedback) that arrived before `before_s`; return how many.

    In small transactions, so that a running server's own writes are never held up for long.
    """
    old = (
        sa.select(REQUESTS.c.request_id)
        .where(REQUESTS.c.time_s < before_s)
        .limit(_PRUNED_PER_TRANSACTION)
    )
    num_rows = 0
    while True:
        with writing(database) as connection:
            ids = connection.execute(old).scalars().all()
            connection.execute(sa.delete(FEEDBACK).where(FEEDBACK.c.request_id.in_(ids)))
            connection.execute(sa.delete(REQUESTS).where(REQUESTS.c.request_id.in_(ids)))
        num_rows += len(ids)
        if len(ids) < _PRUNED_PER_TRANSACTION:
            return num_rows


def keep_within(database: Database, max_bytes: float) -> int:
    """Delete some of the oldest requests if all take more than `max_bytes`; return how many.

    A tenth is freed, so that this is seldom. SQLite uses the room again, and gives none back. What
    has a bound of its own does not count.
    """
    with database.connect() as connection:
        num_rows = connection.execute(sa.select(sa.func.count()).select_from(REQUESTS)).scalar_one()
        size_bytes = _size_bytes(connection, num_rows)
        excess = num_rows * (1 - 0.9 * max_bytes / size_bytes) if size_bytes > max_bytes else 0.0
        num_deleted = min(int(excess), _MOST_PER_LOOK)
        if num_deleted < 1:
            return 0
        times = (
            sa.select(REQUESTS.c.time_s).order_by(REQUESTS.c.time_s).offset(num_deleted).limit(1)
        )
        before_s = connection.execute(times).scalar()
    return 0 if before_s is None else prune(database, before_s=before_s)


def _size_bytes(connection: sa.Connection, num_rows: int) -> float:
    if connection.dialect.name == "sqlite":
        used = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("page_size", "page_count", "freelist_count")
        ]
        others = sum(
            connection.execute(sa.select(sa.func.sum(table.c.num_bytes))).scalar() or 0
            for table in (RESPONSES, FILES)
        )
        return float(used[0] * (used[1] - used[2]) - others)
    newest = (
        sa.select(REQUESTS).order_by(REQUESTS.c.time_s.desc()).limit(_SAMPLE).subquery("newest")
    )
    size = sa.select(sa.func.avg(sa.func.pg_column_size(sa.literal_column("newest.*"))))
    mean_bytes = connection.execute(size.select_from(newest)).scalar()
    return float(mean_bytes or 0.0) * num_rows * _OVERHEAD
