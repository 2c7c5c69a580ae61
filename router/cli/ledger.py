"""The ledger's commands: `shoal report`, `shoal ledger` and `shoal keys`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

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

keys_app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)
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
    from router.ledger.sizes import prune

    with refusing(), opened(ledger, config) as database:
        num_rows = prune(database, before_s=read_time(older_than))
    typer.echo(f"{num_rows:,} rows deleted")


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
    from policies.tables import text_table
    from router.ledger.export import plot as draw
    from router.ledger.export import report_lines
    from router.ledger.queries import spend

    with refusing(), opened(ledger, config) as database:
        groups = read_groups(by)
        within = read_period(since, until).holds()
        rows = spend(database, by=groups, where=within)
        typer.echo(text_table(report_lines(groups, rows), num_left=len(groups)))
        if plot is not None:
            series: GroupBy = next(
                (name for name in groups if name not in {"day", "hour"}), "model"
            )
            by_day = spend(database, by=("day", series), where=within)
            draw(by_day, plot, unit=unit, series=series)
            typer.echo(f"plot: {plot}")


@keys_app.command("create")
def create_key(
    *,
    name: Annotated[str, typer.Option(help="What to call it; never used twice.")],
    scope: Annotated[Literal["user", "admin"], typer.Option(help="What it may do.")] = "user",
    usd_per_day: Annotated[float | None, typer.Option(min=0, show_default=False)] = None,
    usd_per_month: Annotated[float | None, typer.Option(min=0, show_default=False)] = None,
    gco2e_per_day: Annotated[float | None, typer.Option(min=0, show_default=False)] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=0, show_default=False)] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=0, show_default=False)] = None,
    cap: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other cap, as NAME=NUMBER: {requests,tokens,usd,wh,gco2e}_per_"
            "{minute,hour,day,month}; may be given several times.",
            show_default=False,
        ),
    ] = None,
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from router.access import keys

    named = {
        "usd_per_day": usd_per_day,
        "usd_per_month": usd_per_month,
        "gco2e_per_day": gco2e_per_day,
        "tokens_per_day": tokens_per_day,
        "requests_per_minute": requests_per_minute,
    }
    with refusing():
        caps = {cap_name: value for cap_name, value in named.items() if value is not None}
        for text in cap or []:
            cap_name, _, value = text.partition("=")
            try:
                caps[cap_name] = float(value)
            except ValueError:
                raise ValueError(f"--cap {text!r}: write NAME=NUMBER") from None
        with opened(ledger, config, create=True) as database:
            key, secret = keys.create_key(database, name=name, scope=scope, caps=caps)
    typer.echo(f"{key.id} ({key.name}). The key, which is shown only this once:", err=True)
    typer.echo(secret)


@keys_app.command("import")
def import_keys(
    folder: Annotated[Path, typer.Argument(help="A folder with a file per key.")],
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Make the keys of a folder known, as a mounted Kubernetes secret has them.

    A file's name is the key's, its content the key; NAME.admin is an admin's. Keys that are known
    already, revoked ones too, stay as they are.
    """
    from router.access.keys import import_key

    with refusing():
        if not folder.is_dir():
            raise ValueError(f"keys: there is no folder {folder}")
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
        with opened(ledger, config, create=True) as database:
            for file in files:
                secret = file.read_text().strip()
                scope: Literal["user", "admin"] = "admin" if file.suffix == ".admin" else "user"
                name = file.name.removesuffix(".admin")
                made = import_key(database, name=name, scope=scope, secret=secret)
                typer.echo(f"{name}: {'known already' if made is None else made.id}")


@keys_app.command("list")
def list_keys(ledger: LedgerOption = None, config: ConfigOption = None) -> None:
    """Print all keys, revoked ones too: id, name, first characters, scope, caps."""
    from policies.tables import text_table
    from router.access import keys
    from router.access.limits import to_number

    with refusing(), opened(ledger, config) as database:
        found = keys.list_keys(database)
    lines = [("id", "key", "scope", "created", "state", "name", "caps")]
    for key in found:
        caps = ", ".join(f"{cap.name}={to_number(cap.resource, cap.limit):g}" for cap in key.caps)
        state = "active" if key.revoked_s is None else f"revoked {_date(key.revoked_s)}"
        made = _date(key.created_s)
        lines.append((key.id, f"{key.prefix}…", key.scope, made, state, key.name, caps))
    typer.echo(text_table(lines, num_left=len(lines[0])))


@keys_app.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="The key's id or name.")],
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Revoke a key for good; running servers refuse it within seconds."""
    from router.access import keys

    with refusing(), opened(ledger, config) as database:
        revoked = keys.revoke_key(database, key)
    typer.echo(f"{revoked.id} ({revoked.name}) is revoked")


def _date(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")
