"""Databases for tests of ledger, keys and caps: an SQLite file, and a real PostgreSQL server."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from router.ledger.database import Database, database_url, open_database
from router.ledger.writer import Ledger
from router.metrics.counting import count_rows
from tests.router.ledger.pgserver import postgresql


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The address of a PostgreSQL server that lives as long as the test session."""
    with postgresql() as server:
        yield server.address


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty database, once of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'shoal.db'}"
        return
    server = request.getfixturevalue("postgresql_server")
    name = f"test_{uuid.uuid4().hex}"
    admin = sa.create_engine(database_url(server), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield server.rpartition("/")[0] + f"/{name}"
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    admin.dispose()


@pytest.fixture
def database(ledger_url: str) -> Iterator[Database]:
    """An open, empty database, once of each kind."""
    opened = open_database(ledger_url)
    yield opened
    opened.dispose()


@pytest.fixture
def new_ledger(ledger_url: str, database: Database) -> Iterator[Callable[..., Ledger]]:
    """Make ledgers on the database, each with connections of its own; they are stopped afterwards.

    A ledger closes its connections when it stops. Were they shared, those that others have in use
    at that moment would be left to the garbage collector.
    """
    made: list[Ledger] = []

    def make(**options: float) -> Ledger:
        own = open_database(ledger_url)
        options = {"close_timeout_s": 120, **options}
        made.append(
            Ledger(own, count=count_rows, logger=logging.getLogger("test.ledger"), **options)
        )
        return made[-1]

    yield make
    for ledger in made:
        ledger.stop()
