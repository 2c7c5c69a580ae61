"""Who may ask, and how much: `shoal keys`, `shoal teams`, and `shoal audit`, who changed that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from router.cli.console import ConfigOption, LedgerOption, SinceOption, opened, read_time, refusing

if TYPE_CHECKING:
    from router.access.limits import Cap

app = typer.Typer(help="Create, list, change and revoke API keys.", no_args_is_help=True)
teams_app = typer.Typer(
    help="Teams: keys that have caps in common, beside their own.", no_args_is_help=True
)

_CapOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A cap, as NAME=NUMBER: {requests,tokens,usd,wh,gco2e}_per_{minute,hour,day,month}; "
        "may be given several times.",
        show_default=False,
    ),
]
_ChangeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cap",
        help="A cap to set, as NAME=NUMBER, or to take away, as NAME=none; may be given several "
        "times. Others stay.",
        show_default=False,
    ),
]
_KeyArgument = Annotated[str, typer.Argument(help="The key's id or name.")]


@app.command("create")
def create_key(
    *,
    name: Annotated[str, typer.Option(help="What to call it; never used twice.")],
    scope: Annotated[Literal["user", "admin"], typer.Option(help="What it may do.")] = "user",
    team: Annotated[
        str | None, typer.Option(help="Whose caps hold too: a team's id or name.")
    ] = None,
    weight: Annotated[
        float, typer.Option(help="Its share of busy engines, beside other keys' 1.")
    ] = 1.0,
    usd_per_day: Annotated[float | None, typer.Option(min=0, show_default=False)] = None,
    usd_per_month: Annotated[float | None, typer.Option(min=0, show_default=False)] = None,
    gco2e_per_day: Annotated[float | None, typer.Option(min=0, show_default=False)] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=0, show_default=False)] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=0, show_default=False)] = None,
    cap: _CapOption = None,
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
        caps |= _read_caps(cap)
        with opened(ledger, config, create=True) as database:
            key, secret = keys.create_key(
                database, name=name, scope=scope, weight=weight, caps=caps, team=team
            )
    typer.echo(f"{key.id} ({key.name}). The key, which is shown only this once:", err=True)
    typer.echo(secret)


@app.command("import")
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


@app.command("list")
def list_keys(ledger: LedgerOption = None, config: ConfigOption = None) -> None:
    """Print all keys, revoked ones too: id, first characters, scope, weight, name, team, caps."""
    from router.access import keys

    with refusing(), opened(ledger, config) as database:
        found = keys.list_keys(database)
    lines = [("id", "key", "scope", "weight", "created", "state", "name", "team", "caps")]
    for key in found:
        state = "active" if key.revoked_s is None else f"revoked {_date(key.revoked_s)}"
        team = key.team.name if key.team else ""
        facts = (f"{key.weight:g}", _date(key.created_s), state, key.name, team, _caps(key.caps))
        lines.append((key.id, f"{key.prefix}…", key.scope, *facts))
    _print(lines)


@app.command("change")
def change_key(
    key: _KeyArgument,
    *,
    cap: _ChangeOption = None,
    team: Annotated[
        str | None, typer.Option(help="Put it into this team.", show_default=False)
    ] = None,
    no_team: Annotated[bool, typer.Option("--no-team", help="Take it out of its team.")] = False,
    weight: Annotated[
        float | None, typer.Option(help="Its share of busy engines.", show_default=False)
    ] = None,
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Change a key's caps, team and weight; running servers follow within seconds."""
    from router.access import keys

    with refusing(), opened(ledger, config) as database:
        if team and no_team:
            raise ValueError("give --team or --no-team, not both")
        changed = keys.change_key(
            database,
            key,
            caps=_read_changes(cap),
            team=False if no_team else team,
            weight=weight,
        )
    team_name = changed.team.name if changed.team else "none"
    typer.echo(
        f"{changed.id} ({changed.name}): team {team_name}, weight {changed.weight:g}, "
        f"caps {_caps(changed.caps)}"
    )


@app.command("revoke")
def revoke_key(key: _KeyArgument, ledger: LedgerOption = None, config: ConfigOption = None) -> None:
    """Revoke a key for good; running servers refuse it within seconds."""
    from router.access import keys

    with refusing(), opened(ledger, config) as database:
        revoked = keys.revoke_key(database, key)
    typer.echo(f"{revoked.id} ({revoked.name}) is revoked")


@teams_app.command("create")
def create_team(
    *,
    name: Annotated[str, typer.Option(help="What to call it; never used twice.")],
    cap: _CapOption = None,
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a team; `shoal keys create --team` and `shoal keys change --team` fill it."""
    from router.access import keys

    with refusing(), opened(ledger, config, create=True) as database:
        team = keys.create_team(database, name=name, caps=_read_caps(cap))
    typer.echo(f"{team.id} ({team.name})")


@teams_app.command("list")
def list_teams(ledger: LedgerOption = None, config: ConfigOption = None) -> None:
    """Print all teams: id, name, caps."""
    from router.access import keys

    with refusing(), opened(ledger, config) as database:
        found = keys.list_teams(database)
    _print(
        [
            ("id", "created", "name", "caps"),
            *((team.id, _date(team.created_s), team.name, _caps(team.caps)) for team in found),
        ]
    )


@teams_app.command("change")
def change_team(
    team: Annotated[str, typer.Argument(help="The team's id or name.")],
    *,
    cap: _ChangeOption = None,
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Change a team's caps; running servers follow within seconds."""
    from router.access import keys

    with refusing(), opened(ledger, config) as database:
        changed = keys.change_team(database, team, caps=_read_changes(cap))
    typer.echo(f"{changed.id} ({changed.name}): caps {_caps(changed.caps)}")


def audit(
    *,
    since: SinceOption = None,
    most: Annotated[int, typer.Option(min=1, help="At most so many, the latest first.")] = 100,
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Print who changed what, and when: keys, teams, reloads."""
    from router.access.audit import read_audit

    with refusing(), opened(ledger, config) as database:
        since_s = None if since is None else read_time(since)
        rows = read_audit(database, since_s=since_s, most=most)
    lines = [("when", "who", "what", "which", "change")]
    for row in rows:
        when = datetime.fromtimestamp(row.time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
        lines.append(
            (when, row.actor, row.action, row.subject, _change(row.before or {}, row.after or {}))
        )
    _print(lines)


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return what became different, as "caps: {} -> {...}"; of what is new its name."""
    if not before:
        return str(after.get("name", ""))
    changed = [name for name in after if before.get(name) != after[name]]
    return "; ".join(
        f"{name}: {json.dumps(before.get(name))} -> {json.dumps(after[name])}" for name in changed
    )


def _read_caps(texts: Sequence[str] | None) -> dict[str, float]:
    caps = {}
    for text in texts or []:
        name, _, value = text.partition("=")
        try:
            caps[name] = float(value)
        except ValueError:
            raise ValueError(f"--cap {text!r}: write NAME=NUMBER") from None
    return caps


def _read_changes(texts: Sequence[str] | None) -> dict[str, float | None]:
    gone = [text for text in texts or [] if text.endswith("=none")]
    kept = _read_caps([text for text in texts or [] if text not in gone])
    return {**dict.fromkeys(text.removesuffix("=none") for text in gone), **kept}


def _caps(caps: Sequence[Cap]) -> str:
    from router.access.limits import to_number

    return ", ".join(f"{cap.name}={to_number(cap.resource, cap.limit):g}" for cap in caps) or "none"


def _print(lines: Sequence[Sequence[str]]) -> None:
    from policies.tables import text_table

    typer.echo(text_table(lines, num_left=len(lines[0])))


def _date(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")
