"""`shoal evaluate`: how good a trained router is on outcomes it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure what was learned on unseen outcomes.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def router(
    file: Annotated[Path, typer.Argument(help="A router (.npz).")],
    outcomes: Annotated[
        Path,
        typer.Argument(help="Outcomes with scores for its models; see `shoal train router`."),
    ],
    *,
    split: Annotated[str | None, typer.Option(help="Measure on this split only.")] = None,
    models: Annotated[
        str | None, typer.Option(help="Choose among these models only, with commas.")
    ] = None,
    trained_on: Annotated[
        Path | None,
        typer.Option(help="Leave out queries that repeat, or nearly, one of these outcomes'."),
    ] = None,
    trained_split: Annotated[
        str | None, typer.Option(help="Of --trained-on, this split only.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the reliability diagram to this PNG.")
    ] = None,
) -> None:
    """Print accuracy, calibration and decision time of a router, beside best single and oracles."""
    from policies.errors import PolicyError
    from policies.evaluation.judge import evaluate_router
    from policies.evaluation.report import draw_reliability, table
    from policies.outcomes import load_outcomes
    from policies.routing.router import load_router

    try:
        report, diagram = evaluate_router(
            load_router(file),
            load_outcomes(outcomes, split=split),
            models=models.split(",") if models else None,
            trained_on=load_outcomes(trained_on, split=trained_split) if trained_on else (),
        )
        print(table(report))
        if plot is not None:
            draw_reliability(diagram, report.title, plot)
            print(f"\nPlot: {plot}")
    except (PolicyError, OSError) as error:
        typer.echo(f"shoal evaluate router: {error}", err=True)
        raise typer.Exit(2) from None
