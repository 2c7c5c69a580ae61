"""API keys and the teams that they belong to: made, changed, revoked, each leaving an audit row.

A key is "sk-shoal-" and 256 random bits, so its plain SHA-256 cannot be reversed by guessing, and
looking it up by that hash leaks nothing through timing. It is shown once. Neither the key nor the
hash is ever logged; `prefix`, its first characters, is what people recognise it by.

A request must fit the caps of its key and those of its key's team. Where engines are busy, a key
gets its turn by its weight. All functions block.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, get_args

import sqlalchemy as sa
from pydantic import BaseModel, PlainSerializer
from sqlalchemy.exc import IntegrityError

from router.access.audit import Action, note
from router.access.limits import TEAM, Cap, read_caps, to_number
from router.ledger.database import Database, writing
from router.ledger.schema import API_KEYS, TEAMS
from router.openapi import TOLD_WHOLE

Scope: TypeAlias = Literal["user", "admin"]

PREFIX = "sk-shoal-"
_LEAST_LENGTH = len(PREFIX) + 32
_WEIGHTS = (0.01, 100.0)
_ID = re.compile(rf"(key_|{TEAM})[0-9a-f]{{12}}")  # of either's


class KeysError(ValueError):
    """A key or team that cannot be made or changed as asked; `field` is what is wrong."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message, field)
        self.field = field

    def __str__(self) -> str:
        return str(self.args[0])


class NameTaken(KeysError):
    """A name that is in use, or was."""


class NotFound(KeysError):
    """A key or a team that is not there."""


def _told_caps(caps: tuple[Cap, ...]) -> dict[str, float]:
    return {cap.name: to_number(cap.resource, cap.limit) for cap in caps}


Caps: TypeAlias = Annotated[
    tuple[Cap, ...], PlainSerializer(_told_caps, return_type=dict[str, float])
]
"""Told as numbers by the caps' names."""


class Team(BaseModel):
    """Keys with caps in common. `created_s` is Unix time."""

    model_config = TOLD_WHOLE

    object: Literal["team"] = "team"
    id: str
    name: str
    caps: Caps = ()
    created_s: float = 0.0


class Key(BaseModel):
    """A key as the server knows it and people see it, who are told its team by name.

    The secret itself is nowhere. Times are Unix seconds.
    """

    model_config = TOLD_WHOLE

    object: Literal["key"] = "key"
    id: str
    name: str
    prefix: str
    scope: Scope = "user"
    team: Annotated[
        Team | None, PlainSerializer(lambda team: team and team.name, return_type=str | None)
    ] = None
    weight: float = 1.0
    caps: Caps = ()
    created_s: float = 0.0
    revoked_s: float | None = None


def create_key(
    database: Database,
    *,
    name: str,
    scope: Scope = "user",
    weight: float = 1.0,
    caps: Mapping[str, float] | None = None,
    team: str | None = None,
    secret: str | None = None,
    actor: str | None = None,
) -> tuple[Key, str]:
    """Make a key and return it with its secret, which cannot be had again.

    `caps` are as in "usd_per_day": 5, `team` is an id or a name. A `secret` that was drawn
    elsewhere takes the place of a new one. The `actor` of the audit is by default who runs this
    process. Raises `KeysError` for a name that is taken or empty, a secret too easy to guess, a
    weight out of range or a team that is not there, `CapError` for a cap that is not known.
    """
    if secret is not None and not (secret.startswith(PREFIX) and len(secret) >= _LEAST_LENGTH):
        raise KeysError(
            f"keys: the secret of {name!r} cannot be used; it is {PREFIX!r} and at least "
            f"{_LEAST_LENGTH - len(PREFIX)} random characters",
            "secret",
        )
    if scope not in get_args(Scope):
        raise KeysError(f"keys: scope {scope!r} is unknown; allowed are user, admin", "scope")
    secret = secret or PREFIX + secrets.token_urlsafe(32)
    row = {
        **_new_row("keys", name, caps),
        "key_id": "key_" + secrets.token_hex(6),
        "prefix": secret[: len(PREFIX) + 4],
        "sha256": hash_secret(secret),
        "scope": scope,
        "weight": _checked(weight),
    }
    with writing(database) as connection:
        row["team_id"] = None if team is None else _team(connection, team).id
        _insert(connection, API_KEYS, row)
        key = _key(connection, row["key_id"])
        note(connection, "key.create", after=key.model_dump(), actor=actor)
    return key, secret


def import_key(database: Database, *, name: str, scope: Scope, secret: str) -> Key | None:
    """Make a key of a `secret` that was drawn elsewhere; None if it is known by that name already.

    Raises `KeysError` as `create_key` does, also where the name stands for another secret.
    """
    known = find_key(database, API_KEYS.c.sha256 == hash_secret(secret), revoked=True)
    if known is not None and known.name == name:
        return None
    return create_key(database, name=name, scope=scope, secret=secret)[0]


def list_keys(database: Database) -> list[Key]:
    """Return all keys, revoked ones too, oldest first."""
    return list(map(_read_key, database.rows(_SELECT_KEYS.order_by(API_KEYS.c.created_s))))


def change_key(
    database: Database,
    id_or_name: str,
    *,
    caps: Mapping[str, float | None] | None = None,
    team: str | Literal[False] | None = None,
    weight: float | None = None,
    actor: str | None = None,
) -> Key:
    """Change a key's `caps`, `team` and `weight`; servers notice within their `cache_s`.

    Caps that are None go, those that are not named stay. `team` None stays as it is, False takes
    the key out of its team. A `weight` of None stays. Raises `KeysError` where there is no
    such key or team, or for a weight out of range, and `CapError`.
    """
    with writing(database) as connection:
        before = _key(connection, id_or_name)
        values: dict[str, Any] = {"caps": _changed(before, caps or {})}
        if team is not None:
            values["team_id"] = _team(connection, team).id if team else None
        if weight is not None:
            values["weight"] = _checked(weight)
        return _update(connection, "key.change", before, values, actor)


def revoke_key(database: Database, id_or_name: str, *, actor: str | None = None) -> Key:
    """Revoke a key for good; servers notice within their `cache_s`. Revoking twice is no error.

    Raises `KeysError` where there is no such key.
    """
    with writing(database) as connection:
        before = _key(connection, id_or_name)
        if before.revoked_s is not None:
            return before
        return _update(connection, "key.revoke", before, {"revoked_s": time.time()}, actor)


def create_team(
    database: Database,
    *,
    name: str,
    caps: Mapping[str, float] | None = None,
    actor: str | None = None,
) -> Team:
    """Make a team; raises `KeysError` for a name that is taken or empty, and `CapError`."""
    row = {**_new_row("teams", name, caps), "team_id": TEAM + secrets.token_hex(6)}
    with writing(database) as connection:
        _insert(connection, TEAMS, row)
        team = _team(connection, row["team_id"])
        note(connection, "team.create", after=team.model_dump(), actor=actor)
    return team


def list_teams(database: Database) -> list[Team]:
    """Return all teams, oldest first."""
    return list(map(_read_team, database.rows(sa.select(TEAMS).order_by(TEAMS.c.created_s))))


def change_team(
    database: Database,
    id_or_name: str,
    *,
    caps: Mapping[str, float | None],
    actor: str | None = None,
) -> Team:
    """Change a team's `caps`, as `change_key` does a key's."""
    with writing(database) as connection:
        before = _team(connection, id_or_name)
        values = {"caps": _changed(before, caps)}
        connection.execute(sa.update(TEAMS).where(TEAMS.c.team_id == before.id).values(values))
        after = _team(connection, before.id)
        note(
            connection,
            "team.change",
            before=before.model_dump(),
            after=after.model_dump(),
            actor=actor,
        )
    return after


def find_key(
    database: Database, chosen: sa.ColumnElement[bool], *, revoked: bool = False
) -> Key | None:
    """Return the key that is `chosen`, a `revoked` one only if asked for."""
    query = _SELECT_KEYS.where(chosen)
    if not revoked:
        query = query.where(API_KEYS.c.revoked_s.is_(None))
    row = database.row(query)
    return None if row is None else _read_key(row)


def hash_secret(secret: str) -> str:
    """Return what is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


_SELECT_KEYS = sa.select(
    API_KEYS,
    TEAMS.c.name.label("team_name"),
    TEAMS.c.caps.label("team_caps"),
    TEAMS.c.created_s.label("team_created_s"),
).join_from(API_KEYS, TEAMS, API_KEYS.c.team_id == TEAMS.c.team_id, isouter=True)


def _key(connection: sa.Connection, id_or_name: str) -> Key:
    chosen = (API_KEYS.c.key_id == id_or_name) | (API_KEYS.c.name == id_or_name)
    row = connection.execute(_SELECT_KEYS.where(chosen)).mappings().first()
    if row is None:
        raise NotFound(f"keys: there is no key {id_or_name!r}; the list of keys shows them", "key")
    return _read_key(row)


def _team(connection: sa.Connection, id_or_name: str) -> Team:
    chosen = (TEAMS.c.team_id == id_or_name) | (TEAMS.c.name == id_or_name)
    row = connection.execute(sa.select(TEAMS).where(chosen)).mappings().first()
    if row is None:
        known = connection.scalars(sa.select(TEAMS.c.name).order_by(TEAMS.c.name).limit(20))
        raise NotFound(
            f"teams: there is no team {id_or_name!r}; there are {', '.join(known) or 'none'}",
            "team",
        )
    return _read_team(row)


def _new_row(what: str, name: str, caps: Mapping[str, float] | None) -> dict[str, Any]:
    """Return what the rows of a new key and a new team have in common, checked."""
    if not name.strip():
        raise KeysError(f"{what}: the name is empty", "name")
    if not name.isprintable():
        raise KeysError(f"{what}: the name {name!r} holds what cannot be printed", "name")
    if _ID.fullmatch(name):
        raise KeysError(f"{what}: the name {name!r} could be the id of another", "name")
    read_caps(caps or {}, f"{what}.{name}")
    return {"name": name, "caps": dict(caps or {}), "created_s": time.time()}


def _insert(connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]) -> None:
    try:
        connection.execute(sa.insert(table).values(**row))
    except IntegrityError:
        raise NameTaken(
            f"{'keys' if table is API_KEYS else 'teams'}: the name {row['name']!r} is taken; "
            "names are never reused",
            "name",
        ) from None


def _update(
    connection: sa.Connection,
    action: Action,
    before: Key,
    values: Mapping[str, Any],
    actor: str | None,
) -> Key:
    connection.execute(
        sa.update(API_KEYS).where(API_KEYS.c.key_id == before.id).values(dict(values))
    )
    after = _key(connection, before.id)
    note(connection, action, before=before.model_dump(), after=after.model_dump(), actor=actor)
    return after


def _changed(owner: Key | Team, caps: Mapping[str, float | None]) -> dict[str, float]:
    """Return the caps of `owner` with `caps` set, those that are None left out."""
    every: dict[str, float | None] = {**_told_caps(owner.caps), **caps}
    # A name that is unknown is refused even where its cap is taken away.
    read_caps({name: value or 0 for name, value in caps.items()}, f"{owner.name}.caps")
    return {name: value for name, value in every.items() if value is not None}


def _checked(weight: float) -> float:
    least, most = _WEIGHTS
    if not least <= weight <= most:
        raise KeysError(f"keys: weight {weight} is not in [{least:g}, {most:g}]", "weight")
    return weight


def _read_team(row: sa.RowMapping | Mapping[str, Any]) -> Team:
    return Team(
        id=row["team_id"],
        name=row["name"],
        caps=read_caps(row["caps"] or {}, f"caps of the team {row['name']!r}"),
        created_s=row["created_s"],
    )


def _read_key(row: sa.RowMapping | Mapping[str, Any]) -> Key:
    team = {
        "team_id": row["team_id"],
        "name": row["team_name"],
        "caps": row["team_caps"],
        "created_s": row["team_created_s"],
    }
    return Key(
        id=row["key_id"],
        name=row["name"],
        prefix=row["prefix"],
        scope=row["scope"],
        weight=row["weight"],
        caps=read_caps(row["caps"] or {}, f"caps of the key {row['name']!r}"),
        team=None if row["team_id"] is None else _read_team(team),
        created_s=row["created_s"],
        revoked_s=row["revoked_s"],
    )
