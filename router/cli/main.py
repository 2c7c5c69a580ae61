"""`shoal`: the commands. Each loads what it needs when it runs, so that the help is quick."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from router.cli import (
    chat,
    checkpoints,
    downscale,
    evaluate,
    experiment,
    keys,
    ledger,
    models,
    plan,
    replay,
    replay_budget,
    report,
    route,
    serve,
    stack,
    train,
)

app = typer.Typer(
    help="Serves a school of small language models as one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {version('shoal')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


app.command()(serve.serve)
app.command()(chat.chat)
app.command()(models.models)
app.command()(plan.plan)
app.command()(checkpoints.inspect)
app.command()(checkpoints.pull)
app.command()(replay.replay)
app.command()(replay_budget.replay_budget)
app.command()(report.report)
app.command()(route.route)
app.command()(downscale.downscale)
app.command()(stack.stack)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(experiment.app, name="experiment")
app.add_typer(keys.app, name="keys")
app.add_typer(ledger.app, name="ledger")
