"""The tables of the ledger's database, and how an older database gets there.

The table `requests` has a column per field of `RequestRecord`.
"""

from __future__ import annotations

import time
import types
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, get_args, get_type_hints

import sqlalchemy as sa

from router.ledger import LedgerError
from router.record import RequestRecord

METADATA = sa.MetaData()


class Text(sa.TypeDecorator[str]):
    """Text as every database takes it, to be written or to be looked for.

    PostgreSQL refuses NUL, and neither takes half a surrogate pair; a request's JSON or path may
    hold both. What stands for them is in no name that we give.
    """

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:  # noqa: ARG002
        """Return what is handed to the database for `value`."""
        if value is None:
            return None
        return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


_TYPES: dict[type, type[sa.types.TypeEngine[Any]]] = {
    str: Text,
    bool: sa.Boolean,
    int: sa.BigInteger,
    float: sa.Double,
}


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(none_as_null=True))


def _column(name: str, kind: type, *, nullable: bool = False, **options: bool) -> sa.Column[Any]:
    """Return a column of a plain type, which always has a value unless it says otherwise."""
    return sa.Column(name, _TYPES[kind], nullable=nullable, **options)  # type: ignore[arg-type]


_text, _count, _real = (partial(_column, kind=kind) for kind in (str, int, float))


def _columns(record: type) -> Iterator[sa.Column[Any]]:
    """Yield a column per field of `record`: a plain type, null where it may be None, or JSON."""
    for name, hint in get_type_hints(record).items():
        kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if kinds[0] in _TYPES:
            yield _column(name, kinds[0], nullable=types.NoneType in kinds)
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
    _text("request_id", primary_key=True),
    _real("time_s", index=True),
    _real("score", nullable=True),
    _text("label", nullable=True),
    _json("metrics"),
    _text("key_id", nullable=True),
)

# One row per experiment that ever ran: what must not change, and what did.
EXPERIMENTS = sa.Table(
    "experiments",
    METADATA,
    _text("name", primary_key=True),
    _text("fingerprint"),
    _real("started_s"),
    _real("checked_s"),
    _json("allocations"),
    _json("stopped"),
)

# What `GET /metrics` shows for all replicas together: sums per series, and published gauges.
METRIC_COUNTERS = sa.Table(
    "metric_counters",
    METADATA,
    _text("series", primary_key=True),
    _real("value"),
)
METRIC_SNAPSHOTS = sa.Table(
    "metric_snapshots",
    METADATA,
    _text("holder", primary_key=True),
    _real("time_s"),
    _text("gauges"),
)

TEAMS = sa.Table(
    "teams",
    METADATA,
    _text("team_id", primary_key=True),
    _text("name", unique=True),
    _json("caps"),
    _real("created_s"),
)

API_KEYS = sa.Table(
    "api_keys",
    METADATA,
    _text("key_id", primary_key=True),
    _text("team_id", nullable=True),
    _text("name", unique=True),
    _text("prefix"),
    _text("sha256", unique=True),
    _text("scope"),
    _real("weight"),
    _json("caps"),
    _real("created_s"),
    _real("revoked_s", nullable=True),
)

# What each server's replicas are to serve, since its first reload.
EDITIONS = sa.Table(
    "editions",
    METADATA,
    _text("server", primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    _real("time_s"),
    _json("contents"),
)

# What administrators did; rows are only ever added.
AUDIT = sa.Table(
    "audit",
    METADATA,
    # SQLite counts up by itself in a column of exactly this type.
    sa.Column("audit_id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    _real("time_s"),
    _text("actor"),
    _text("action"),
    _text("subject"),
    _json("before"),
    _json("after"),
)

# Amounts of budgets are integers (money, energy and carbon in billionths), so that sums are exact.
_AMOUNTS = ("requests", "tokens", "nano_usd", "nano_wh", "nano_gco2e")

BUDGET_WINDOWS = sa.Table(
    "budget_windows",
    METADATA,
    _text("window_id", primary_key=True),
    _count("end_s", index=True),
    *(_count(f"{state}_{name}") for state in ("spent", "held", "estimated") for name in _AMOUNTS),
)

BUDGET_HOLDS = sa.Table(
    "budget_holds",
    METADATA,
    _text("request_id", primary_key=True),
    _text("holder", index=True),
    _real("expires_s"),
    sa.Column("lapsed", sa.Boolean, nullable=False),
    _json("windows"),
    *(_count(name) for name in _AMOUNTS),
    sa.Index("budget_holds_by_expiry", "lapsed", "expires_s"),
)

# Responses that clients had kept, each with the conversation that it answers: JSON texts.
RESPONSES = sa.Table(
    "responses",
    METADATA,
    _text("response_id", primary_key=True),
    _text("key_id", nullable=True),
    _real("created_s", index=True),
    _real("expires_s", index=True),
    _count("num_bytes"),
    _text("body"),
    _text("items"),
)

# Files that clients uploaded for batches, and those that batches wrote; shown once they are ready.
FILES = sa.Table(
    "files",
    METADATA,
    _text("file_id", primary_key=True),
    _text("key_id", index=True, nullable=True),
    _text("filename"),
    _text("purpose"),
    _count("num_bytes"),
    _real("created_s"),
    _real("expires_s", index=True),
    sa.Column("ready", sa.Boolean, nullable=False),
)
FILE_PARTS = sa.Table(
    "file_parts",
    METADATA,
    _text("file_id", primary_key=True),
    _count("part", primary_key=True, autoincrement=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

# Offline work. `times` says when each status began, in Unix seconds; until `lease_s` it is the
# `holder`'s, a replica, to work on.
BATCHES = sa.Table(
    "batches",
    METADATA,
    _text("batch_id", primary_key=True),
    _text("key_id", index=True, nullable=True),
    _text("endpoint"),
    _text("input_file_id"),
    _text("output_file_id", nullable=True),
    _text("error_file_id", nullable=True),
    _text("status", index=True),
    _real("created_s"),
    _real("expires_s"),
    _json("times"),
    _json("errors"),
    _json("metadata"),
    _count("num_total"),
    _count("num_completed"),
    _count("num_failed"),
    _text("holder", nullable=True),
    _real("lease_s"),
)

# What only this installation's servers know.
SECRETS = sa.Table(
    "secrets",
    METADATA,
    _text("name", primary_key=True),
    _text("value"),
)

SCHEMA_VERSION = sa.Table(
    "schema_version",
    METADATA,
    sa.Column("version", sa.Integer, primary_key=True),
    _real("time_s"),
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
