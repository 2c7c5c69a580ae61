"""What commands share: refusals, which ledger and which rows, and a running server."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    import httpx

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
ConfigArgument = Annotated[Path, typer.Argument(help="The server's configuration file.")]
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
UrlOption: TypeAlias = Annotated[
    str, typer.Option(envvar="SHOAL_URL", help="The server's address.")
]
KeyOption: TypeAlias = Annotated[
    str | None, typer.Option(envvar="SHOAL_API_KEY", help="An API key, if the server wants one.")
]
OutcomesOption: TypeAlias = Annotated[
    Path, typer.Option("--out", help="Where the outcomes go (JSON Lines).")
]

SeedOption: TypeAlias = Annotated[
    int,
    typer.Option(
        min=0, max=2**32 - 1, help="Another seed draws another division, folds or clusters."
    ),
]

_UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def finite(value: float | None) -> float | None:
    """Refuse "nan" and "inf", which pass an option's bounds or may."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def names_in(text: str | None) -> list[str] | None:
    """Return the names that an option lists with commas, each once; None without the option."""
    if text is None:
        return None
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


@contextmanager
def refusing(command: str | None = None, *more: type[Exception]) -> Iterator[None]:
    """Turn what the user got wrong into one line on stderr.

    With a `command`: settings, pools, data and files that cannot be used, and `more`; exit code 2.
    Without: any `ValueError`, and files and disks that fail; exit code 1.
    """
    from models.errors import DownscaleError, PoolError
    from policies.errors import PolicyError
    from router.ledger import LedgerError

    refused: tuple[type[Exception], ...] = (ValueError, OSError)
    if command:
        refused = (PolicyError, PoolError, LedgerError, DownscaleError, OSError, *more)
    try:
        yield
    except refused as error:
        told = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            told = f"{error.filename}: {error.strerror}"  # without Python's number of it
        typer.echo(f"{f'shoal {command}' if command else 'Error'}: {told}", err=True)
        raise typer.Exit(2 if command else 1) from None


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
    from router.ledger import LedgerError
    from router.ledger.database import database_url, open_database

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


def connect(url: str, key: str | None) -> httpx.Client:
    """Return a client of the server at `url`, with or without "/v1" at its end."""
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    base = url.rstrip("/").removesuffix("/v1")
    return httpx.Client(base_url=base, headers=headers, timeout=30)


@contextmanager
def refuse_errors(url: str) -> Iterator[None]:
    """End the command with one clear line when the server isn't there or says no."""
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        try:
            message = error.response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {error.response.status_code}"
        typer.echo(f"shoal: the server refused: {message}", err=True)
        raise typer.Exit(1) from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        typer.echo(
            f"shoal: no server answers at {url} ({error}); start one with `shoal serve`, "
            "or name another with --url",
            err=True,
        )
        raise typer.Exit(1) from None
