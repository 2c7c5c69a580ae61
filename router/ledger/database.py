"""Opens the database that holds ledger, keys and budgets: an SQLite file, or PostgreSQL.

SQLite runs in WAL mode: readers never wait, and writers take turns (`busy_timeout`). A commit
survives the death of the process and, unless `fast_commits` are asked for, a power cut.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from router.ledger import LedgerError
from router.ledger.schema import migrate

Database: TypeAlias = sa.Engine

DEFAULT_URL = "sqlite:///shoal.db"

# PostgreSQL's advisory locks are numbers; these are ours, nothing else uses the database.
MIGRATION_LOCK = 5_350_001
BUDGET_LOCK = 5_350_002

_BUSY_TIMEOUT_MS = 10_000
_LOCK = sa.text("SELECT pg_advisory_xact_lock(:lock)")


class LedgerConfig(BaseModel):
    """The `ledger:` section of the configuration: where rows go and how eagerly.

    `url` is any SQLAlchemy address of SQLite or PostgreSQL; a relative file is made absolute
    here, since replicas may run in another folder. A row reaches the database at most
    `flush_interval_s` after its request ended. At most `queue_rows` rows wait (while the database
    is down, say); later ones are counted as dropped. `keep_text` also stores the last user
    message and the answer, which retraining a router needs; without it no text is stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(DEFAULT_URL, validate_default=True)
    flush_interval_s: float = Field(0.2, gt=0, le=60)
    queue_rows: int = Field(50_000, ge=1)
    keep_text: bool = False

    @field_validator("url")
    @classmethod
    def _usable(cls, value: str) -> str:
        return database_url(value)


def database_url(value: str) -> str:
    """Return `value` as an address this module can open, with an absolute path if it is a file.

    Raises `LedgerError` for anything but an SQLite file or a PostgreSQL server.
    """
    try:
        url = make_url(value)
    except ArgumentError:
        raise LedgerError(f"ledger.url: {value!r} is not a database address; {_ALLOWED}") from None
    if url.drivername in {"postgres", "postgresql"}:
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in {"sqlite", "sqlite+pysqlite", "postgresql+psycopg"}:
        raise LedgerError(f"ledger.url: {url.drivername!r} is not supported; {_ALLOWED}")
    if url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}:
        raise LedgerError(
            "ledger.url: an SQLite ledger needs a file, since several processes share it; "
            f"{_ALLOWED}"
        )
    if url.get_backend_name() == "sqlite":
        url = url.set(database=str(Path(str(url.database)).expanduser().absolute()))
    return url.render_as_string(hide_password=False)


_ALLOWED = "allowed are sqlite:///path/to/file.db and postgresql://user:password@host/database"


def open_database(value: str, *, fast_commits: bool = False) -> Database:
    """Open the database at `value`, creating or upgrading its tables.

    With `fast_commits` a commit does not wait for the disk: a power cut may undo the last ones,
    the death of a process may not. Safe when several processes open it at once. Raises
    `LedgerError` when it cannot be opened.
    """
    url = make_url(database_url(value))
    try:
        if url.get_backend_name() == "sqlite":
            database = _open_sqlite(url, fast_commits)
        else:
            options = {"options": "-c synchronous_commit=off"} if fast_commits else {}
            database = sa.create_engine(url, pool_pre_ping=True, connect_args=options)
        try:
            with writing(database, lock=MIGRATION_LOCK) as connection:
                migrate(connection)
        except Exception:
            database.dispose()
            raise
    except ImportError:
        raise LedgerError(
            "ledger.url: PostgreSQL needs the package psycopg: pip install 'shoal[postgres]'"
        ) from None
    except (OperationalError, OSError) as error:
        reason = str(getattr(error, "orig", error)).strip()
        raise LedgerError(f"ledger.url: cannot open {url!r}: {reason}") from None
    return database


@contextmanager
def writing(database: Database, *, lock: int | None = None) -> Iterator[sa.Connection]:
    """Run a transaction that writes; it commits on leaving, or rolls back on an exception.

    In SQLite it is the only writer from its first statement on, so that it cannot fail half-way
    for having read before another wrote. With `lock`, it also excludes every other transaction
    under the same number in PostgreSQL, whichever process or machine runs it.
    """
    with database.connect() as connection:
        connection.execution_options(shoal_writing=True)
        with connection.begin():
            if lock is not None and database.dialect.name == "postgresql":
                connection.execute(_LOCK, {"lock": lock})
            yield connection


def _open_sqlite(url: sa.URL, fast_commits: bool) -> Database:
    def on_connect(connection: Any, _record: object) -> None:  # noqa: ANN401 (of the driver)
        connection.isolation_level = None  # transactions are ours to begin, see _on_begin
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        _use_wal(cursor)
        cursor.execute(f"PRAGMA synchronous = {'NORMAL' if fast_commits else 'FULL'}")
        cursor.close()

    Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    database = sa.create_engine(url)
    event.listen(database, "connect", on_connect)
    event.listen(database, "begin", _on_begin)
    return database


def _use_wal(cursor: Any) -> None:  # noqa: ANN401
    # Changing the mode does not honour busy_timeout, so processes that start together retry.
    deadline = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            if cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                cursor.execute("PRAGMA journal_mode = WAL")
            return
        except Exception as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _on_begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("shoal_writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
