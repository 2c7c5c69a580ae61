"""`shoal ledger`: export rows, remove old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from router.cli.console import (
    ConfigOption,
    LedgerOption,
    SinceOption,
    UntilOption,
    opened,
    read_period,
    read_time,
    refusing,
)
from router.ledger import Format

app = typer.Typer(help="Export the ledger's rows, or remove old ones.", no_args_is_help=True)


@app.command("export")
def export_rows(
    *,
    target: Annotated[Path, typer.Argument(help="The file to write.")],
    format: Annotated[
        Format | None,
        typer.Option(help="Format of the file. [default: by the file's ending]"),
    ] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Write the ledger's rows to TARGET, however many there are, in order of time."""
    from router.ledger.export import export

    with refusing(), opened(ledger, config) as database:
        endings = {f".{name}": name for name in get_args(Format)}
        if format is None and target.suffix not in endings:
            raise ValueError(
                f"the ending of {target} is none of {', '.join(endings)}; give --format"
            )
        num_rows = export(
            database,
            target,
            format=format or endings[target.suffix],
            period=read_period(since, until),
        )
    typer.echo(f"{num_rows:,} rows in {target}")


@app.command("prune")
def prune_rows(
    *,
    older_than: Annotated[str, typer.Option(help="Age from which rows go: 30d, 12h, 45m.")],
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Delete rows (and the feedback on them) that are older than --older-than."""
    from router.ledger.export import prune

    with refusing(), opened(ledger, config) as database:
        num_rows = prune(database, before_s=read_time(older_than))
    typer.echo(f"{num_rows:,} rows deleted")
