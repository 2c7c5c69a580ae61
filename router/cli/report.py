"""`shoal report`: what was spent, by day, model, policy, key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from router.cli.ledger_options import (
    ConfigOption,
    LedgerOption,
    SinceOption,
    UntilOption,
    opened,
    read_period,
    refusing,
)
from router.ledger.names import GroupBy, Unit, read_groups


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
    from router.ledger import report as reporting
    from router.ledger.queries import sums

    with refusing(), opened(ledger, config) as database:
        groups = read_groups(by)
        period = read_period(since, until)
        typer.echo(reporting.table(groups, sums(database, by=groups, period=period)))
        if plot is not None:
            series: GroupBy = next(
                (name for name in groups if name not in {"day", "hour"}), "model"
            )
            by_day = sums(database, by=("day", series), period=period)
            reporting.plot(by_day, plot, unit=unit, series=series)
            typer.echo(f"plot: {plot}")
