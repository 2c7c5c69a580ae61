"""What the commands on the ledger share: which database, and which rows."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from router.ledger.database import Database
    from router.ledger.queries import Period

LedgerOption = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        envvar="SHOAL_LEDGER",
        help="Address of the database. [default: that of --config, or sqlite:///shoal.db]",
        show_default=False,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="The server's configuration file.", show_default=False),
]
SinceOption = Annotated[
    str | None,
    typer.Option(
        help="Only rows from here on: 2026-11-01, 2026-11-01T12:00 (UTC), or an age: 30d, 12h.",
        show_default=False,
    ),
]
UntilOption = Annotated[
    str | None, typer.Option(help="Only rows before this; as --since.", show_default=False)
]

_UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what the user got wrong into one line on stderr and exit code 1."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def opened(
    ledger: str | None, config: Path | None, *, create: bool = False, option: str = "--ledger"
) -> Iterator[Database]:
    """Open the database that the options name, and close it on leaving.

    Raises `LedgerError` for an SQLite file that is not there, unless it may be created; `option`
    is the one that named it.
    """
    from sqlalchemy.engine import make_url

    from router.config import load_args
    from router.ledger.database import database_url, open_database
    from router.ledger.errors import LedgerError

    if ledger is None:
        ledger = load_args(config).ledger.url
    url = make_url(database_url(ledger))
    if url.get_backend_name() == "sqlite" and not create and not Path(str(url.database)).exists():
        raise LedgerError(f"there is no ledger at {url.database}; name it with {option}")
    database = open_database(ledger)
    try:
        yield database
    finally:
        database.dispose()


def read_period(since: str | None, until: str | None) -> Period:
    """Return the period that --since and --until name."""
    from router.ledger.queries import Period

    return Period(
        since_s=None if since is None else read_time(since),
        until_s=None if until is None else read_time(until),
    )


def read_time(text: str) -> float:
    """Return the Unix time of an ISO date or time (UTC unless it says), or of an age ("30d")."""
    if match := re.fullmatch(r"(\d+)([mhdw])", text):
        return time.time() - int(match[1]) * _UNITS_S[match[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a date (2026-11-01), a time (2026-11-01T12:00) "
            "nor an age (45m, 12h, 30d, 4w)"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
