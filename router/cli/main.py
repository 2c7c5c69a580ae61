"""`shoal`: the commands. Each loads what it needs when it runs, so that the help is quick."""

from __future__ import annotations

import signal
from importlib.metadata import version
from typing import Annotated

import typer

from router.cli import (
    asking,
    budget,
    calibrate,
    costs,
    experiment,
    keys,
    learn,
    ledger,
    outcomes,
    plan,
    pools,
    serve,
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
app.command()(asking.chat)
app.command()(asking.models)
app.command()(plan.plan)
app.command()(pools.inspect)
app.command()(pools.pull)
app.command()(experiment.replay)
app.add_typer(budget.app, name="budget")
app.command()(ledger.report)
app.command()(costs.costs)
app.add_typer(calibrate.app, name="calibrate")
app.command()(asking.route)
app.command()(pools.downscale)
app.command()(pools.stack)
app.command()(learn.learn)
app.add_typer(train.app, name="train")
app.add_typer(train.evaluate_app, name="evaluate")
app.add_typer(experiment.app, name="experiment")
app.add_typer(keys.app, name="keys")
app.add_typer(keys.teams_app, name="teams")
app.command()(keys.audit)
app.add_typer(ledger.app, name="ledger")
outcomes.app.command()(learn.collect)
app.add_typer(outcomes.app, name="outcomes")


def main() -> None:
    """Run the command that the arguments name.

    SIGTERM and a terminal that closes end it as Ctrl-C does: what it has open is closed, and its
    temporary files go.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, signal.default_int_handler)
    app()
