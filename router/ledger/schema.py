"""The tables of the ledger's database, and how an older database gets there.

The table `requests` has a column per field of `RequestRecord`.
"""

from __future__ import annotations

import time
import types
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_type_hints

import sqlalchemy as sa

from router.ledger import LedgerError
from router.record import RequestRecord

METADATA = sa.MetaData()

_TYPES: dict[type, type[sa.types.TypeEngine[Any]]] = {
    str: sa.Text,
    bool: sa.Boolean,
    int: sa.BigInteger,
    float: sa.Double,
}


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(none_as_null=True))


def _columns(record: type) -> Iterator[sa.Column[Any]]:
    """Yield a column per field of `record`: a plain type, null where it may be None, or JSON."""
    for name, hint in get_type_hints(record).items():
        kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if kinds[0] in _TYPES:
            yield sa.Column(name, _TYPES[kinds[0]], nullable=types.NoneType in kinds)
        else:
            yield _json(name)


REQUESTS = sa.Table(
    "requests",
    METADATA,
    *_columns(RequestRecord),
    sa.PrimaryKeyConstraint("request_id"),
    sa.Index("requests_by_time", "time_s"),
    sa.Index("requests_by_key", "key_id", "time_s"),
    sa.Index("requests_by_experiment", "experiment", "time_s"),
    sa.Index("requests_by_conversation", "conversation", "time_s"),
)

FEEDBACK = sa.Table(
    "feedback",
    METADATA,
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("time_s", sa.Double, nullable=False, index=True),
    sa.Column("score", sa.Double),
    sa.Column("label", sa.Text),
    _json("metrics"),
    sa.Column("key_id", sa.Text),
)

# One row per experiment that ever ran: what must not change, and what did.
EXPERIMENTS = sa.Table(
    "experiments",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("started_s", sa.Double, nullable=False),
    sa.Column("checked_s", sa.Double, nullable=False),
    _json("allocations"),
    _json("stopped"),
)

# What `GET /metrics` shows for all replicas together: sums per series, and published gauges.
METRIC_COUNTERS = sa.Table(
    "metric_counters",
    METADATA,
    sa.Column("series", sa.Text, primary_key=True),
    sa.Column("value", sa.Double, nullable=False),
)
METRIC_SNAPSHOTS = sa.Table(
    "metric_snapshots",
    METADATA,
    sa.Column("holder", sa.Text, primary_key=True),
    sa.Column("time_s", sa.Double, nullable=False),
    sa.Column("gauges", sa.Text, nullable=False),
)

TEAMS = sa.Table(
    "teams",
    METADATA,
    sa.Column("team_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    _json("caps"),
    sa.Column("created_s", sa.Double, nullable=False),
)

API_KEYS = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("team_id", sa.Text),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("prefix", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False, unique=True),
    sa.Column("scope", sa.Text, nullable=False),
    _json("caps"),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("revoked_s", sa.Double),
)

# What each server's replicas are to serve, since its first reload.
EDITIONS = sa.Table(
    "editions",
    METADATA,
    sa.Column("server", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("time_s", sa.Double, nullable=False),
    _json("contents"),
)

# What administrators did; rows are only ever added.
AUDIT = sa.Table(
    "audit",
    METADATA,
    # SQLite counts up by itself in a column of exactly this type.
    sa.Column("audit_id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("time_s", sa.Double, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    _json("before"),
    _json("after"),
)

# Amounts of budgets are integers (money, energy and carbon in billionths), so that sums are exact.
_AMOUNTS = ("requests", "tokens", "nano_usd", "nano_wh", "nano_gco2e")

BUDGET_WINDOWS = sa.Table(
    "budget_windows",
    METADATA,
    sa.Column("window_id", sa.Text, primary_key=True),
    sa.Column("end_s", sa.BigInteger, nullable=False, index=True),
    *(
        sa.Column(f"{state}_{name}", sa.BigInteger, nullable=False)
        for state in ("spent", "held", "estimated")
        for name in _AMOUNTS
    ),
)

BUDGET_HOLDS = sa.Table(
    "budget_holds",
    METADATA,
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False, index=True),
    sa.Column("expires_s", sa.Double, nullable=False),
    sa.Column("lapsed", sa.Boolean, nullable=False),
    _json("windows"),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in _AMOUNTS),
    sa.Index("budget_holds_by_expiry", "lapsed", "expires_s"),
)

# Responses that clients had kept, each with the conversation that it answers: JSON texts.
RESPONSES = sa.Table(
    "responses",
    METADATA,
    sa.Column("response_id", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Text),
    sa.Column("created_s", sa.Double, nullable=False, index=True),
    sa.Column("expires_s", sa.Double, nullable=False, index=True),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("items", sa.Text, nullable=False),
)

# Files that clients uploaded for batches, and those that batches wrote; shown once they are ready.
FILES = sa.Table(
    "files",
    METADATA,
    sa.Column("file_id", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Text, index=True),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("expires_s", sa.Double, nullable=False, index=True),
    sa.Column("ready", sa.Boolean, nullable=False),
)
FILE_PARTS = sa.Table(
    "file_parts",
    METADATA,
    sa.Column("file_id", sa.Text, primary_key=True),
    sa.Column("part", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

# Offline work. `times` says when each status began, in Unix seconds; until `lease_s` it is the
# `holder`'s, a replica, to work on.
BATCHES = sa.Table(
    "batches",
    METADATA,
    sa.Column("batch_id", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Text, index=True),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("input_file_id", sa.Text, nullable=False),
    sa.Column("output_file_id", sa.Text),
    sa.Column("error_file_id", sa.Text),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("expires_s", sa.Double, nullable=False),
    _json("times"),
    _json("errors"),
    _json("metadata"),
    sa.Column("num_total", sa.BigInteger, nullable=False),
    sa.Column("num_completed", sa.BigInteger, nullable=False),
    sa.Column("num_failed", sa.BigInteger, nullable=False),
    sa.Column("holder", sa.Text),
    sa.Column("lease_s", sa.Double, nullable=False),
)

# What only this installation's servers know.
SECRETS = sa.Table(
    "secrets",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

SCHEMA_VERSION = sa.Table(
    "schema_version",
    METADATA,
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("time_s", sa.Double, nullable=False),
)

# What brings a database of version n to n + 1, the first entry from 1 to 2: plain SQL that SQLite
# and PostgreSQL both understand, such as "ALTER TABLE requests ADD COLUMN colour TEXT". A released
# step never changes. A new database has the tables above from the start.
STEPS: tuple[tuple[str, ...], ...] = ()


def migrate(connection: sa.Connection) -> None:
    """Bring the schema to the newest version; nothing happens when it is there already.

    Runs inside the caller's exclusive transaction, so that a step happens wholly or not at all, and
    once, however many replicas start together. Raises `LedgerError` for a database that a newer
    Shoal has upgraded, and for one that is not a Shoal's, or an unreleased one's.
    """
    newest = 1 + len(STEPS)
    tables = sa.inspect(connection).get_table_names()
    if SCHEMA_VERSION.name not in tables:
        # A file is wholly ours; in PostgreSQL others' tables may be beside ours.
        own = connection.dialect.name == "sqlite"
        foreign = tables if own else METADATA.tables.keys() & set(tables)
        if foreign:
            raise LedgerError(
                f"it is not a ledger, but holds others' tables ({', '.join(sorted(foreign)[:3])}); "
                "use another database"
            )
        METADATA.create_all(connection)
        _note_version(connection, newest)
        return
    _check_columns(connection, [SCHEMA_VERSION])
    found = connection.execute(sa.select(sa.func.max(SCHEMA_VERSION.c.version))).scalar() or 0
    if found > newest:
        raise LedgerError(
            f"the database has schema version {found}, this Shoal knows up to "
            f"{newest}; use a newer Shoal, or another database"
        )
    if 0 < found < newest:
        for statement in (text for step in STEPS[found - 1 :] for text in step):
            connection.exec_driver_sql(statement)
        _note_version(connection, newest)
    _check_columns(connection, METADATA.sorted_tables)


def _note_version(connection: sa.Connection, version: int) -> None:
    connection.execute(sa.insert(SCHEMA_VERSION).values(version=version, time_s=time.time()))


def _check_columns(connection: sa.Connection, tables: Iterable[sa.Table]) -> None:
    """Raise `LedgerError` if one of `tables` is not as this Shoal would have made it."""
    inspector = sa.inspect(connection)
    for table in tables:
        found = inspector.get_columns(table.name) if inspector.has_table(table.name) else []
        missing = set(table.columns.keys()) - {column["name"] for column in found}
        if missing:
            raise LedgerError(
                f"its table {table.name!r} lacks {', '.join(sorted(missing)[:3])}: another Shoal, "
                "or none, made it; use another database, or move this one away"
            )
