"""Where replicas keep what they count and publish: the ledger's database.

Counters are sums per series; a replica adds to them in the transaction that writes the rows they
come from, so that a row is counted exactly if it is kept. Nothing ever takes away from them, the
pruning of old rows included. Snapshots are gauges under the name of who published them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from router.ledger.database import Database, writing
from router.metrics.derive import tally
from router.metrics.family import Series, Values

logger = logging.getLogger(__name__)

# Both SQLite and PostgreSQL understand these.
_ADD = sa.text(
    "INSERT INTO metric_counters (series, value) VALUES (:series, :value) ON CONFLICT (series) "
    "DO UPDATE SET value = metric_counters.value + excluded.value"
)
_COUNTERS = sa.text("SELECT series, value FROM metric_counters")
_PUBLISH = sa.text(
    "INSERT INTO metric_snapshots (holder, time_s, gauges) VALUES (:holder, :time_s, :gauges) "
    "ON CONFLICT (holder) DO UPDATE SET time_s = excluded.time_s, gauges = excluded.gauges"
)
_SNAPSHOTS = sa.text("SELECT holder, time_s, gauges FROM metric_snapshots WHERE time_s > :since_s")
_FORGET = sa.text("DELETE FROM metric_snapshots WHERE time_s < :before_s OR holder = :holder")
_CLAIM = sa.text(
    "UPDATE metric_snapshots SET time_s = :now_s WHERE holder = :holder AND time_s <= :due_s"
)
_ENTER = sa.text(
    "INSERT INTO metric_snapshots (holder, time_s, gauges) VALUES (:holder, :time_s, :gauges) "
    "ON CONFLICT (holder) DO NOTHING"
)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The gauges that `holder` published at Unix time `time_s`."""

    holder: str
    time_s: float
    gauges: Values


def count_rows(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Count new `rows` of the table `requests` within the transaction that writes them."""
    try:
        counts = tally(rows)
    except Exception:
        # Metrics must not cost a row.
        logger.exception("metrics: %d rows are not counted", len(rows))
        return
    add_counts(connection, counts)


def add_counts(connection: sa.Connection, counts: Values) -> None:
    """Add `counts` within the caller's transaction.

    Always in the same order, so that transactions of several replicas cannot lock each other out.
    """
    rows = [{"series": _pack(series), "value": counts[series]} for series in sorted(counts)]
    if rows:
        connection.execute(_ADD, rows)


class Store:
    """The store of all replicas that share a ledger. Raises SQLAlchemy's errors."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def counters(self) -> dict[Series, float]:
        """Return every counter."""
        with self._database.connect() as connection:
            return {_unpack(text): value for text, value in connection.execute(_COUNTERS)}

    def publish(
        self, holder: str, gauges: Values, *, now_s: float, counts: Values | None = None
    ) -> None:
        """Replace what `holder` published by `gauges`, and add `counts`."""
        text = json.dumps([[*series, value] for series, value in gauges.items()])
        with writing(self._database) as connection:
            connection.execute(_PUBLISH, {"holder": holder, "time_s": now_s, "gauges": text})
            add_counts(connection, counts or {})

    def snapshots(self, *, since_s: float) -> list[Snapshot]:
        """Return what was published after `since_s`."""
        with self._database.connect() as connection:
            rows = connection.execute(_SNAPSHOTS, {"since_s": since_s}).all()
        return [
            Snapshot(
                holder=holder,
                time_s=time_s,
                gauges={tuple(series): value for *series, value in json.loads(gauges)},
            )
            for holder, time_s, gauges in rows
        ]

    def claim(self, holder: str, *, now_s: float, every_s: float) -> bool:
        """Return whether the caller is to publish as `holder` now: nobody was, for `every_s`."""
        with writing(self._database) as connection:
            connection.execute(_ENTER, {"holder": holder, "time_s": 0.0, "gauges": "[]"})
            due = {"holder": holder, "now_s": now_s, "due_s": now_s - every_s}
            return connection.execute(_CLAIM, due).rowcount == 1

    def forget(self, *, before_s: float, holder: str | None = None) -> None:
        """Delete what was published before `before_s`, and all that `holder` published."""
        with writing(self._database) as connection:
            connection.execute(_FORGET, {"before_s": before_s, "holder": holder})


@lru_cache(maxsize=10_000)
def _pack(series: Series) -> str:
    return json.dumps(series, ensure_ascii=False, separators=(",", ":"))


def _unpack(text: str) -> Series:
    return tuple(json.loads(text))
