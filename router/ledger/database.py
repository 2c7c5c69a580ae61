"""Opens the database that holds ledger, keys and budgets: an SQLite file, or PostgreSQL.

SQLite runs in WAL mode: readers never wait, and writers take turns (`busy_timeout`). A commit
survives the death of the process and, unless `fast_commits` are asked for, a power cut. Neither
passwords nor values of statements are in what errors say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import Field, field_validator
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError

from policies.kinds import Count, Strict
from router.ledger import LedgerError
from router.ledger.calls import STATEMENT_DEADLINE_S, Calls
from router.ledger.schema import migrate

DEFAULT_URL = "sqlite:///shoal.db"

# PostgreSQL's advisory locks are numbers; these are ours, nothing else uses the database.
MIGRATION_LOCK = 5_350_001
BUDGET_LOCK = 5_350_002

_BUSY_TIMEOUT_MS = 10_000
_CONNECT_TIMEOUT_S = 5
_CALL_TIMEOUT_S = 5.0
_REPORT_TIMEOUT_S = 30.0
_INSTRUCTIONS = 100_000  # of SQLite, between two looks at the clock: some milliseconds
# Each connection keeps so many statements compiled, 3 kB for each row that one inserts, and an
# insert of another number of rows is another statement. More rows at a time are no faster.
_CACHED_STATEMENTS = 32
_MOST_ROWS_PER_INSERT = 8
_LOCK = sa.text("SELECT pg_advisory_xact_lock(:lock)")


class Database:
    """An open database: connections for threads, and calls for the event loop.

    `calls` are what a request waits for, `reports` what may take longer: neither holds up the
    other.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.calls = Calls(timeout_s=_CALL_TIMEOUT_S)
        self.reports = Calls(timeout_s=_REPORT_TIMEOUT_S, num_threads=2)

    @property
    def dialect(self) -> sa.Dialect:
        """The SQL that it speaks; its name is sqlite or postgresql."""
        return self.engine.dialect

    def connect(self) -> sa.Connection:
        """Return a connection; blocks, and raises SQLAlchemy's errors."""
        return self.engine.connect()

    def rows(self, query: sa.Executable) -> list[dict[str, Any]]:
        """Return all rows that `query` finds, by their columns' names; as `connect`."""
        with self.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def row(self, query: sa.Executable) -> dict[str, Any] | None:
        """Return the first row that `query` finds, None where there is none; as `connect`."""
        with self.connect() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else dict(row)

    def dispose(self) -> None:
        """Close it; calls that hang are left behind."""
        self.calls.close()
        self.reports.close()
        self.engine.dispose()


class LedgerConfig(Strict):
    """The `ledger:` section of the configuration: where rows go and how eagerly.

    `url` is any SQLAlchemy address of SQLite or PostgreSQL; a relative file is made absolute
    here, since replicas may run in another folder. A row reaches the database at most
    `flush_interval_s` after its request ended. At most `queue_rows` rows wait (while the database
    is down, say), fewer where they are large; later ones are counted as dropped.
    Requests that are refused before anything runs are all counted, and `refused_rows_per_minute` of
    them, per replica, leave a row. When the rows take more than `max_gb` (null: no limit), the
    oldest are deleted. `keep_text` also stores the last user message, the answer and feedback's
    labels, which retraining a router needs; without it no text is stored.
    """

    url: str = Field(DEFAULT_URL, validate_default=True, repr=False)
    flush_interval_s: float = Field(0.2, gt=0, le=60)
    queue_rows: Count = 50_000
    refused_rows_per_minute: int = Field(60, ge=0, le=1_000_000)
    max_gb: float | None = Field(10, gt=0)
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
    except (ArgumentError, ValueError):  # whose text may hold a password
        raise LedgerError(f"ledger.url: it is not a database address; {_ALLOWED}") from None
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


def open_database(
    value: str, *, fast_commits: bool = False, statement_timeout_s: float | None = None
) -> Database:
    """Open the database at `value`, creating or upgrading its tables.

    With `fast_commits` a commit to an SQLite file does not wait for the disk: a power cut may undo
    the last ones, the death of a process may not. PostgreSQL ends statements that take longer than
    `statement_timeout_s`. Safe when several processes open it at once. Raises `LedgerError` when it
    cannot be opened, or is no ledger of this Shoal's.
    """
    url = make_url(database_url(value))
    shown = url.set(query={})  # in which a password may stand, too
    is_file = url.get_backend_name() == "sqlite"
    try:
        if is_file:
            engine = _open_sqlite(url, fast_commits)
        else:
            engine = _open_postgresql(url, statement_timeout_s)
        database = Database(engine)
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
    except LedgerError as error:
        raise LedgerError(f"ledger.url: {shown!r}: {error}") from None
    except (DBAPIError, OSError) as error:
        reason = str(getattr(error, "orig", error)).strip()
        advice = "; name another file, or move this one away" if is_file else ""
        raise LedgerError(f"ledger.url: cannot open {shown!r}: {reason}{advice}") from None
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


def _open_sqlite(url: sa.URL, fast_commits: bool) -> sa.Engine:
    def on_connect(connection: Any, _record: object) -> None:  # noqa: ANN401 (of the driver)
        connection.isolation_level = None  # transactions are ours to begin, see _on_begin
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        _use_wal(cursor)
        cursor.execute(f"PRAGMA synchronous = {'NORMAL' if fast_commits else 'FULL'}")
        cursor.close()
        connection.set_progress_handler(_is_late, _INSTRUCTIONS)

    Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(
        url,
        hide_parameters=True,
        insertmanyvalues_page_size=_MOST_ROWS_PER_INSERT,
        connect_args={"cached_statements": _CACHED_STATEMENTS},
        pool_use_lifo=True,  # those beyond what is used at once keep nothing
    )
    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", _on_begin)
    event.listen(engine, "handle_error", _let_go)
    return engine


def _let_go(context: sa.engine.ExceptionContext) -> None:
    """Open the file anew after it was found damaged: a connection keeps what it has read."""
    if type(context.sqlalchemy_exception) is DatabaseError:
        context.is_disconnect = True


def _is_late() -> bool:
    return time.monotonic() > STATEMENT_DEADLINE_S.get()


def _open_postgresql(url: sa.URL, statement_timeout_s: float | None) -> sa.Engine:
    arguments: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        # A machine that is gone says nothing: these notice.
        "keepalives_idle": 10,
        "tcp_user_timeout": 10_000,
    }
    if statement_timeout_s is not None:
        arguments["options"] = f"-c statement_timeout={round(statement_timeout_s * 1000)}"
    return sa.create_engine(
        url,
        hide_parameters=True,
        insertmanyvalues_page_size=_MOST_ROWS_PER_INSERT,
        pool_pre_ping=True,
        pool_use_lifo=True,
        pool_timeout=_CALL_TIMEOUT_S,
        connect_args=arguments,
    )


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
