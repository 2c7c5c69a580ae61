"""`shoal budget`: what a target would have done on your own traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from router.cli.console import (
    ConfigArgument,
    SinceOption,
    UntilOption,
    opened,
    read_period,
    refusing,
)

if TYPE_CHECKING:
    from policies.budget.simulate import Simulation
    from policies.budgeted import BudgetedSettings
    from router.config import AppArgs

app = typer.Typer(
    help="Say what a target would have done, before anybody turns it on.", no_args_is_help=True
)


@app.command("simulate")
def simulate_budget(
    *,
    config: ConfigArgument,
    traffic: Annotated[
        str | None,
        typer.Option(help="Address of the ledger with the traffic. [default: the configuration's]"),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="The budgeted policy. [default: the only one there is]"),
    ] = None,
    resource: Annotated[
        Literal["usd", "wh", "gco2e"] | None,
        typer.Option(
            help="What to limit, where not a policy's target but this one is to be tried."
        ),
    ] = None,
    amount: Annotated[float | None, typer.Option(min=0, help="How much of it.")] = None,
    per: Annotated[
        Literal["hour", "1000_requests"], typer.Option(help="In an hour, or for 1,000 requests.")
    ] = "hour",
    since: SinceOption = "7d",
    until: UntilOption = None,
) -> None:
    """Say what past traffic would have cost and been worth under a target, and who pays for it."""
    from models.pool import load_pool
    from router.config import load_args
    from router.whatif import what_if

    with refusing("budget simulate", ValueError):
        args = load_args(config)
        settings = _settings(args, policy, resource, amount, per)
        with opened(traffic, config, option="--traffic") as database:
            found = what_if(
                database,
                args,
                load_pool(args.pool),
                settings,
                period=read_period(since, until),
                most=10**9,
            )
    limited = settings.targets[0].resource
    typer.echo(found.sentence(settings.targets, limited))
    if found.total.num_requests:
        typer.echo("")
        typer.echo(simulation_text(found, limited))
    else:
        typer.echo(f"Only requests from --since {since} on were looked at.")


def _settings(
    args: AppArgs, policy: str | None, resource: str | None, amount: float | None, per: str
) -> BudgetedSettings:
    """Return the settings of the policy that is meant, or of the target on the command line."""
    from pydantic import ValidationError

    from models.pool import load_pool
    from policies.budgeted import BudgetedSettings
    from policies.kinds import explain

    specs = {**load_pool(args.pool).policies, **args.policies}
    budgeted = [name for name, spec in specs.items() if spec.get("kind") == "budgeted"]
    if policy is not None and policy not in budgeted:
        raise ValueError(
            f"--policy: {policy!r} is no budgeted policy; allowed are {', '.join(budgeted) or '-'}"
        )
    own = {}
    if policy or len(budgeted) == 1:
        own = {key: value for key, value in specs[policy or budgeted[0]].items() if key != "kind"}
    if (resource is None) != (amount is None):
        raise ValueError("--resource and --amount go together")
    if resource is not None:
        own["targets"] = [{"resource": resource, "amount": amount, "per": per}]
    if not own.get("targets"):
        raise ValueError(
            "which target? Name one with --resource and --amount, or with --policy one of "
            f"{', '.join(budgeted) or 'the budgeted policies, of which there is none'}"
        )
    known = {key: own[key] for key in own if key in BudgetedSettings.model_fields}
    try:
        return BudgetedSettings.model_validate({"policy": {}, **known})
    except ValidationError as error:
        raise ValueError(explain(error)) from None


_HEAD = (
    *("domain", "requests", "fewer members", "cheaper", "was", "under", "change"),
    *("quality was", "under"),
)


def simulation_text(found: Simulation, resource: str) -> str:
    """Return a table: a line per domain, most requests first, then all together."""
    from policies.tables import text_table

    domains = sorted(found.domains.items(), key=lambda entry: -entry[1].num_requests)
    lines = [(_HEAD[0], *_HEAD[1:4], f"{resource} was", *_HEAD[5:])]
    for name, sums in [*domains, ("all", found.total)]:
        was, under, quality = sums.was[resource], sums.under[resource], sums.to_json()
        lines.append(
            (
                name,
                f"{sums.num_requests:,}",
                f"{sums.num_fewer / sums.num_requests:.1%}",
                f"{sums.num_cheaper / sums.num_requests:.1%}",
                f"{was:.4g}",
                f"{under:.4g}",
                f"{under / was - 1:+.1%}" if was else "-",
                f"{quality['quality_was']:.3f}",
                f"{quality['quality_under']:.3f}",
            )
        )
    return text_table(lines)
