"""`shoal report`: what was spent, by day, model, policy, key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from router.cli.console import (
    ConfigOption,
    LedgerOption,
    SinceOption,
    UntilOption,
    opened,
    read_period,
    refusing,
    show,
)
from router.ledger import GroupBy, Unit, read_groups


def report(
    *,
    by: Annotated[
        str,
        typer.Option(
            help="Group by these: day, hour, key, model, policy, members, experiment, arm, "
            "endpoint, status, method (how energy is known)."
        ),
    ] = "day,model",
    since: SinceOption = None,
    until: UntilOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw spend per day into this PNG.", show_default=False),
    ] = None,
    unit: Annotated[Unit, typer.Option(help="What the plot shows.")] = "usd",
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Print requests, tokens, USD, Wh and gCO2e from the ledger, by day and model."""
    from router.ledger.export import plot as draw
    from router.ledger.export import report_lines
    from router.ledger.queries import spend

    with refusing(), opened(ledger, config) as database:
        groups = read_groups(by)
        within = read_period(since, until).holds()
        rows = spend(database, by=groups, where=within)
        show(report_lines(groups, rows), num_left=len(groups))
        if plot is not None:
            series: GroupBy = next(
                (name for name in groups if name not in {"day", "hour"}), "model"
            )
            by_day = spend(database, by=("day", series), where=within)
            draw(by_day, plot, unit=unit, series=series)
            typer.echo(f"plot: {plot}")
