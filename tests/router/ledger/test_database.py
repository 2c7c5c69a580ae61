"""Opening and migrating the database."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml
from pydantic import ValidationError

from router.config import ConfigError, load_args
from router.ledger import LedgerError
from router.ledger.database import Database, LedgerConfig, database_url, open_database, writing
from router.ledger.queries import spend
from router.ledger.schema import METADATA, REQUESTS, STEPS, Text
from router.ledger.writer import row_of
from tests.router.ledger.records import record


def test_a_new_database_has_what_queries_expect(database: Database) -> None:
    """Every table has the columns, keys and NOT NULLs of the schema."""
    inspector = sa.inspect(database.engine)
    for name, table in METADATA.tables.items():
        found = {column["name"]: column for column in inspector.get_columns(name)}
        assert set(found) == {column.name for column in table.columns}
        keys = inspector.get_pk_constraint(name)["constrained_columns"]
        assert keys == [column.name for column in table.primary_key]
        for column in table.columns:
            assert found[column.name]["nullable"] == column.nullable or column.primary_key
            kinds = (sa.Text, sa.Float, sa.Boolean, sa.JSON, sa.Integer, sa.LargeBinary)
            made = column.type.impl_instance if isinstance(column.type, Text) else column.type
            [kind] = [kind for kind in kinds if isinstance(made, kind)]
            assert isinstance(found[column.name]["type"], kind), column


def test_many_replicas_may_start_at_once(ledger_url: str) -> None:
    """Three processes that open an empty database together all succeed and migrate once."""
    script = f"from router.ledger.database import open_database; open_database({ledger_url!r})"

    def start(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(start, range(3)))
    assert [result.returncode for result in results] == [0] * 3, results[0].stderr
    database = open_database(ledger_url)
    with database.connect() as connection:
        versions = connection.exec_driver_sql("SELECT version FROM schema_version").scalars().all()
    database.dispose()
    assert versions == [1 + len(STEPS)]


def test_a_failed_migration_leaves_nothing_behind(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails is undone whole, and the next start carries on from there."""
    open_database(ledger_url).dispose()
    broken = (*STEPS, ("CREATE TABLE half (x INTEGER)", "CREATE TABLE half (x INTEGER)"))
    with monkeypatch.context() as patch:
        patch.setattr("router.ledger.schema.STEPS", broken)
        with pytest.raises(LedgerError, match="half"):
            open_database(ledger_url)
    database = open_database(ledger_url)
    tables = sa.inspect(database.engine).get_table_names()
    database.dispose()
    assert "half" not in tables and "requests" in tables


def test_a_newer_database_is_refused(ledger_url: str, database: Database) -> None:
    """A database that a newer Shoal has upgraded is not touched."""
    with writing(database) as connection:
        connection.exec_driver_sql("INSERT INTO schema_version VALUES (99, 0)")
    with pytest.raises(LedgerError, match="schema version 99"):
        open_database(ledger_url)


def test_an_sqlite_writer_does_not_fail_for_having_read_first(tmp_path: Path) -> None:
    """Threads that read, then write in one transaction take turns instead of failing."""
    database = open_database(f"sqlite:///{tmp_path / 'x.db'}")
    with writing(database) as connection:
        connection.exec_driver_sql("CREATE TABLE counter (n INTEGER)")
        connection.exec_driver_sql("INSERT INTO counter VALUES (0)")

    def count(_: int) -> None:
        with writing(database) as connection:
            n = connection.exec_driver_sql("SELECT n FROM counter").scalar_one()
            connection.exec_driver_sql("UPDATE counter SET n = ?", (n + 1,))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(200)))
    with database.connect() as connection:
        assert connection.exec_driver_sql("SELECT n FROM counter").scalar_one() == 200
    database.dispose()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/x", "'mysql' is not supported; allowed are sqlite:///"),
        ("shoal.db", "not a database address"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("postgresql://shoal@127.0.0.1:1/x", "cannot open"),
        ("sqlite:////proc/no/such.db", "cannot open"),
    ],
)
def test_unusable_addresses_are_named(url: str, message: str) -> None:
    """An address that cannot be opened raises an error that says why and what is allowed."""
    with pytest.raises(LedgerError, match=message):
        open_database(url)


def test_passwords_stay_out_of_errors() -> None:
    """The error for an unreachable server does not show the password."""
    with pytest.raises(LedgerError) as caught:
        open_database("postgresql://shoal:s3cret@127.0.0.1:1/x")
    assert "s3cret" not in str(caught.value)


def test_config_makes_files_absolute_and_refuses_unknown_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas in other folders share one file; a misspelt key is an error."""
    monkeypatch.chdir(tmp_path)
    assert LedgerConfig().url == f"sqlite:///{tmp_path}/shoal.db"
    assert database_url("postgres://a:b@c/d") == "postgresql+psycopg://a:b@c/d"
    with pytest.raises(ValidationError, match="flush_interval"):
        LedgerConfig.model_validate({"flush_interval": 1})
    with pytest.raises(ValidationError, match="not supported"):
        LedgerConfig(url="oracle://x")


def test_an_older_ledger_is_upgraded_with_its_rows(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a later version runs once on a database that has rows; new ones start there."""
    old = open_database(ledger_url)
    with writing(old) as connection:
        connection.execute(sa.insert(REQUESTS).values(row_of(record(1))))
    old.dispose()
    steps = (("ALTER TABLE requests ADD COLUMN colour TEXT", "CREATE TABLE later (x INTEGER)"),)
    monkeypatch.setattr("router.ledger.schema.STEPS", steps)
    for _ in range(2):
        database = open_database(ledger_url)
        with database.connect() as connection:
            names = {c["name"] for c in sa.inspect(connection).get_columns("requests")}
            versions = connection.exec_driver_sql("SELECT version FROM schema_version").scalars()
            assert sorted(versions) == [1, 2]
        assert names == {"colour", *(column.name for column in REQUESTS.columns)}
        [row] = spend(database, by=["policy"])
        assert row.num_requests == 1
        database.dispose()


def _damaged(path: Path) -> None:
    path.write_bytes(b"this is no database, but long enough to be taken for one" * 100)


def _foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.commit()


def _older(path: Path) -> None:
    open_database(f"sqlite:///{path}").dispose()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE requests DROP COLUMN session")
        connection.commit()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_damaged, "not a database"),
        (_foreign, "holds others' tables"),
        (_older, "'requests' lacks session"),
    ],
)
def test_a_file_that_is_no_ledger_of_ours_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], None], told: str
) -> None:
    """A damaged, foreign or older file is named with what to do."""
    path = tmp_path / "some.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=told) as caught:
        open_database(f"sqlite:///{path}")
    assert str(path) in str(caught.value)
    assert "another" in str(caught.value)
    assert "\n" not in str(caught.value)
    if make is _damaged:
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://shoal:s3cret@host:port/x",
        "postgresql://shoal:s3cret",
        "mysql://shoal:s3cret@host/x",
        "shoal:s3cret@host",
    ],
)
def test_passwords_stay_out_of_malformed_addresses(tmp_path: Path, url: str) -> None:
    """Neither the ledger nor the configuration shows an address that may hold a password."""
    with pytest.raises(LedgerError) as caught:
        open_database(url)
    assert "s3cret" not in str(caught.value)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"ledger": {"url": url}}))
    with pytest.raises(ConfigError) as refused:
        load_args(file)
    assert "s3cret" not in str(refused.value)
    assert "ledger.url" in str(refused.value)


def test_statements_values_stay_out_of_errors(database: Database) -> None:
    """What a statement was about is not in the text of its error."""
    with pytest.raises(sa.exc.SQLAlchemyError) as caught, writing(database) as connection:
        connection.execute(sa.text("SELECT * FROM nowhere WHERE x = :x"), {"x": "s3cret"})
    assert "s3cret" not in str(caught.value)
