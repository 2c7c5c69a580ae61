"""`shoal keys`: create, list and revoke API keys."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from router.cli.console import ConfigOption, LedgerOption, opened, refusing

app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)


@app.command("create")
def create(
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
    from router.access.keys import create_key

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
            key, secret = create_key(database, name=name, scope=scope, caps=caps)
    typer.echo(f"{key.id} ({key.name}). The key, which is shown only this once:", err=True)
    typer.echo(secret)


@app.command("import")
def import_all(
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


@app.command("list")
def list_all(ledger: LedgerOption = None, config: ConfigOption = None) -> None:
    """Print all keys, revoked ones too: id, name, first characters, scope, caps."""
    from router.access.keys import list_keys
    from router.access.limits import to_number

    with refusing(), opened(ledger, config) as database:
        keys = list_keys(database)
    for key in keys:
        caps = ", ".join(f"{cap.name}={to_number(cap.resource, cap.limit):g}" for cap in key.caps)
        state = "active" if key.revoked_s is None else f"revoked {_date(key.revoked_s)}"
        typer.echo(
            f"{key.id}  {key.prefix}…  {key.scope:5}  {_date(key.created_s)}  {state}  "
            f"{key.name}{f'  ({caps})' if caps else ''}"
        )


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id or name.")],
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Revoke a key for good; running servers refuse it within seconds."""
    from router.access.keys import revoke_key

    with refusing(), opened(ledger, config) as database:
        revoked = revoke_key(database, key)
    typer.echo(f"{revoked.id} ({revoked.name}) is revoked")


def _date(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")
