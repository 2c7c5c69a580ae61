"""How large the ledger may grow: old requests are deleted, by age or by what all of them take."""

from __future__ import annotations

import sqlalchemy as sa

from router.ledger.database import Database, writing
from router.ledger.schema import FEEDBACK, FILES, REQUESTS, RESPONSES

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
