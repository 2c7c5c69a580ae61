"""What an experiment found, and what to expect of a policy: `shoal experiment`, `shoal replay`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policies.errors import ExperimentError
from router.cli.console import ConfigArgument, LedgerOption, opened, refusing

if TYPE_CHECKING:
    from collections.abc import Callable

    from policies.experiments.replay import Estimate, ReplayedPolicy
    from router.catalog.catalog import Catalog
    from router.config import AppArgs
    from router.experiments.reporting import Summary


app = typer.Typer(help="List A/B experiments, or report on one.", no_args_is_help=True)

_ExperimentsOption = Annotated[
    Path, typer.Option("--config", help="The server's configuration, with its experiments.")
]


@app.command("list")
def list_experiments(*, config: _ExperimentsOption, ledger: LedgerOption = None) -> None:
    """Print every configured experiment: status, arms, units and the advice of the moment."""
    with refusing():
        for summary in _summaries(config, ledger, None):
            report = summary.report
            arms = ", ".join(f"{arm.name} {arm.num_units:,}" for arm in report.arms)
            typer.echo(f"{report.name}  [{summary.status}]  {report.unit}s: {arms}")
            typer.echo(f"  {report.recommendation}")


@app.command("report")
def report_experiment(
    *,
    name: Annotated[str, typer.Argument(help="The experiment.")],
    config: _ExperimentsOption,
    ledger: LedgerOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the confidence sequence into this PNG.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what GET /v1/experiments/NAME answers.")
    ] = False,
) -> None:
    """Print means per arm, lift with its always-valid interval and p, power, and what to do."""
    from policies.files import check_target, write_atomic
    from router.experiments.reporting import as_text

    with refusing():
        if plot is not None:
            check_target(plot, option="--plot", suffix=".png")
        [summary] = _summaries(config, ledger, name)
        if as_json:
            typer.echo(json.dumps(summary.to_json(), indent=2))
        else:
            typer.echo(as_text(summary))
        if plot is not None:
            write_atomic(plot, summary.plot())
            typer.echo(f"plot: {plot}", err=as_json)


@app.command("export")
def export_experiment(
    *,
    name: Annotated[str, typer.Argument(help="The experiment.")],
    out: Annotated[Path, typer.Option(help="The folder to write into.")],
    config: _ExperimentsOption,
    ledger: LedgerOption = None,
) -> None:
    """Write assignments and metrics as Parquet, with SQL views for GrowthBook and warehouses."""
    from router.experiments.warehouse import export_experiment as export

    with refusing():
        [summary] = _summaries(config, ledger, name)
        num_requests = export(summary, out)
    typer.echo(f"{num_requests:,} requests of {summary.report.num_units:,} units in {out}")


def _summaries(config: Path, ledger: str | None, name: str | None) -> list[Summary]:
    from router.config import load_args
    from router.experiments.experiments import read_definitions
    from router.experiments.reporting import summarise

    definitions, _ = read_definitions(load_args(config))
    chosen = [one for one in definitions if name is None or one.name == name]
    if name is not None and not chosen:
        known = ", ".join(one.name for one in definitions) or "none"
        raise ExperimentError(f"there is no experiment {name!r} in {config}; it has {known}")
    with opened(ledger, config) as database:
        return [summarise(database, one, now_s=time.time()) for one in chosen]


_HEAD = ("policy", "quality", "95% interval", "IPS", "SNIPS", "worth", "requests", "USD/1,000")


def replay(
    *,
    config: ConfigArgument,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            help="Outcomes (a .jsonl file of every model's answers), or a ledger's address "
            "or SQLite file.",
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Replay this policy; may be repeated. [default: every arm's]"),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(help="The experiment whose traffic to use. [default: the only one]"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split of the outcomes.")] = None,
) -> None:
    """Estimate a policy's quality and cost before anybody is sent to it.

    From outcomes every plan of single models and cascades is played out. From a ledger the
    estimate is off-policy, doubly robust; IPS and SNIPS stand beside it, and "worth" is how many
    requests of the policy itself the log equals. Refused where the past says nothing.
    """
    from models.pool import load_pool
    from router.config import load_args
    from router.editions import catalog_of
    from router.experiments.experiments import read_definitions

    with refusing():
        args = load_args(config)
        catalog = catalog_of(args, load_pool(args.pool))
        definitions, _ = read_definitions(args)
        arms = [arm.policy for one in definitions for arm in one.arms]
        names = list(dict.fromkeys(policy or arms or catalog.policies))
        for name in names:
            if name not in catalog.policies:
                raise ValueError(
                    f"--policy {name!r} is unknown; allowed are {', '.join(catalog.policies)}"
                )
        if source.endswith(".jsonl"):
            play = _from_outcomes(source, split, catalog)
        else:
            play = _from_ledger(source, experiment, args, catalog)
        _print({name: _try(play, name) for name in names})


def _from_outcomes(
    source: str, split: str | None, catalog: Catalog
) -> Callable[[str], ReplayedPolicy]:
    from policies.experiments.replay import replay_outcomes
    from policies.outcomes import read_outcomes

    found = read_outcomes(source, split=split)
    return lambda name: replay_outcomes(
        found, catalog.policies[name], rates=catalog.prices.rates, scorers=catalog.policies.scorers
    )


def _from_ledger(
    source: str, experiment: str | None, args: AppArgs, catalog: Catalog
) -> Callable[[str], ReplayedPolicy]:
    from policies.experiments.replay import replay_log
    from router.experiments.experiments import read_definitions
    from router.experiments.reporting import read_log

    definitions, _ = read_definitions(args)
    chosen = [one for one in definitions if experiment in (None, one.name)]
    if len(chosen) != 1:
        known = ", ".join(one.name for one in definitions) or "none"
        raise ValueError(f"--experiment: name one of the configuration's: {known}")
    address = source if "://" in source else f"sqlite:///{source}"

    def play(name: str) -> ReplayedPolicy:
        with opened(address, None, option="--from") as database:
            log = read_log(database, chosen[0], catalog, target=name)
        return replay_log(log, catalog.policies[name], policies=catalog.policies)

    return play


def _try(play: Callable[[str], ReplayedPolicy], name: str) -> ReplayedPolicy | str:
    try:
        return play(name)
    except ExperimentError as error:
        return str(error)


def _print(results: dict[str, ReplayedPolicy | str]) -> None:
    from policies.tables import text_table

    rows = [
        _HEAD,
        *(_cells(n, found) for n, found in results.items() if not isinstance(found, str)),
    ]
    if len(rows) > 1:
        typer.echo(text_table(rows))
    refused = {name: found for name, found in results.items() if isinstance(found, str)}
    for name, reason in refused.items():
        typer.echo(f"{name}: refused. {reason}", err=True)
    if refused and len(rows) == 1:
        raise typer.Exit(1)


def _cells(name: str, found: ReplayedPolicy) -> tuple[str, ...]:
    off = found.off_policy
    return (
        name,
        f"{found.quality.value:.4f}",
        f"[{found.quality.low:.4f}, {found.quality.high:.4f}]",
        _short(off.ips if off else None),
        _short(off.snips if off else None),
        f"{off.num_effective:,.0f}" if off else "all",
        f"{found.num_requests:,}",
        f"{1000 * found.usd.value:.4g}" if found.usd else "-",
    )


def _short(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.value:.4f}"
