"""The ledger's commands: `shoal report` and `shoal ledger`."""

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
from router.ledger import Format, GroupBy, Unit, read_groups

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
    from router.ledger.writer import prune

    with refusing(), opened(ledger, config) as database:
        num_rows = prune(database, before_s=read_time(older_than))
    typer.echo(f"{num_rows:,} rows deleted")


def report(
    *,
    by: Annotated[
        str,
        typer.Option(
            help="Group by these: day, hour, key, team, model, policy, members, experiment, "
            "arm, endpoint, status, method (how energy is known), price (how money is)."
        ),
    ] = "day,model",
    since: SinceOption = None,
    until: UntilOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw spend per day into this PNG.", show_default=False),
    ] = None,
    unit: Annotated[
        Unit,
        typer.Option(help="What the plot shows; with joules the table tells of energy."),
    ] = "usd",
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Print requests, tokens, USD, Wh and gCO2e from the ledger, by day and model."""
    from policies.files import check_target
    from policies.tables import text_table
    from router.ledger.export import plot as draw
    from router.ledger.export import report_lines
    from router.ledger.queries import spend

    with refusing(), opened(ledger, config) as database:
        if plot is not None:
            check_target(plot, option="--plot", suffix=".png")
        groups = read_groups(by)
        within = read_period(since, until).holds()
        rows = spend(database, by=groups, where=within)
        typer.echo(text_table(report_lines(groups, rows, unit=unit), num_left=len(groups)))
        if plot is not None:
            series: GroupBy = next(
                (name for name in groups if name not in {"day", "hour"}), "model"
            )
            by_day = spend(database, by=("day", series), where=within)
            draw(by_day, plot, unit=unit, series=series)
            typer.echo(f"plot: {plot}")
