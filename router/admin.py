"""`/v1/admin`: keys, teams, the audit and reloads over HTTP, for those who bring an admin's key.

What a command line does (`shoal keys`, `shoal teams`, `shoal audit`), by the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from router.access import keys
from router.access.audit import ANONYMOUS, AuditRow, read_audit
from router.access.authentication import Identify
from router.bodies import Bodies
from router.editions import Editions
from router.errors import bad_request
from router.ledger.database import Database
from router.openai_api.fields import read_fields, read_json
from router.openapi import Listing, described

_MOST_BODY_BYTES = 2**16
_MOST_ROWS = 1000

Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]
Caps: TypeAlias = dict[str, float]


class EditionFacts(BaseModel):
    """What is loaded: its number, since when (Unix time), and its policies."""

    object: Literal["edition"]
    number: int
    loaded_s: float
    policies: list[str]


class MadeKey(keys.Key):
    """A new key with its secret, which is shown only this once."""

    secret: str


class KeyList(Listing):
    """All keys, oldest first."""

    data: list[keys.Key]


class TeamList(Listing):
    """All teams, oldest first."""

    data: list[keys.Team]


class AuditList(Listing):
    """A page of the audit, the latest row first."""

    data: list[AuditRow]


Body = TypeVar("Body", bound=BaseModel)
Number = TypeVar("Number", int, float)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Nothing(_Body):
    """A body that says nothing; it may be left out."""


class NewKey(_Body):
    """A key to make; `team` is an id or a name, `weight` its share of busy engines."""

    name: Name
    scope: Literal["user", "admin"] = "user"
    team: Name | None = None
    weight: float = 1.0
    caps: Caps = {}


class ChangedKey(_Body):
    """What to change of a key: caps that are null go, others stay; `team` null takes it out."""

    team: Name | None = None
    weight: float | None = None
    caps: dict[str, float | None] = {}


class NewTeam(_Body):
    """A team to make."""

    name: Name
    caps: Caps = {}


class ChangedTeam(_Body):
    """What to change of a team: caps that are null go, others stay."""

    caps: dict[str, float | None]


def add_admin_routes(
    api: FastAPI, database: Database, *, identify: Identify, bodies: Bodies
) -> None:
    """Add the routes of keys, teams and the audit for administrators, as `identify` tells."""

    async def administrator(request: Request) -> str:
        return await identify(request) or ANONYMOUS

    async def read(request: Request, schema: type[Body]) -> Body:
        body = await bodies.take(request, read_json, None, _MOST_BODY_BYTES)
        return read_fields(schema, body, {})

    async def create_key(request: Request) -> JSONResponse:
        actor, new = await administrator(request), await read(request, NewKey)
        key, secret = await run(keys.create_key, database, **new.model_dump(), actor=actor)
        return _told({**key.model_dump(), "secret": secret})

    async def list_keys(request: Request) -> JSONResponse:
        await administrator(request)
        return _listed(await run(keys.list_keys, database))

    async def change_key(request: Request, key: str) -> JSONResponse:
        actor, changed = await administrator(request), await read(request, ChangedKey)
        leaves = "team" in changed.model_fields_set and changed.team is None
        changed_key = await run(
            keys.change_key,
            database,
            key,
            caps=changed.caps,
            team=False if leaves else changed.team,
            weight=changed.weight,
            actor=actor,
        )
        return _told(changed_key.model_dump())

    async def revoke_key(request: Request, key: str) -> JSONResponse:
        actor = await administrator(request)
        revoked = await run(keys.revoke_key, database, key, actor=actor)
        return _told(revoked.model_dump())

    async def create_team(request: Request) -> JSONResponse:
        actor, new = await administrator(request), await read(request, NewTeam)
        team = await run(keys.create_team, database, **new.model_dump(), actor=actor)
        return _told(team.model_dump())

    async def list_teams(request: Request) -> JSONResponse:
        await administrator(request)
        return _listed(await run(keys.list_teams, database))

    async def change_team(request: Request, team: str) -> JSONResponse:
        actor, changed = await administrator(request), await read(request, ChangedTeam)
        changed_team = await run(keys.change_team, database, team, caps=changed.caps, actor=actor)
        return _told(changed_team.model_dump())

    async def audit(request: Request) -> JSONResponse:
        await administrator(request)
        rows = await run(
            read_audit,
            database,
            since_s=_number(request, "since_s", float),
            before_id=_number(request, "before_id", int),
            most=min(_number(request, "limit", int) or 100, _MOST_ROWS),
        )
        return _listed(rows)

    run = database.calls.run
    rows = ("since_s", "before_id", "limit")
    for method, path, answer, extra in (
        ("POST", "/keys", create_key, described(MadeKey, takes=NewKey)),
        ("GET", "/keys", list_keys, described(KeyList)),
        ("POST", "/keys/{key}", change_key, described(keys.Key, takes=ChangedKey)),
        ("DELETE", "/keys/{key}", revoke_key, described(keys.Key)),
        ("POST", "/teams", create_team, described(keys.Team, takes=NewTeam)),
        ("GET", "/teams", list_teams, described(TeamList)),
        ("POST", "/teams/{team}", change_team, described(keys.Team, takes=ChangedTeam)),
        ("GET", "/audit", audit, described(AuditList, query=rows)),
    ):
        api.add_api_route("/v1/admin" + path, answer, methods=[method], openapi_extra=extra)


def add_reload_routes(api: FastAPI, editions: Editions, *, identify: Identify) -> None:
    """Add `POST /v1/admin/reload` and `GET /v1/admin/edition` for whom `identify` lets in."""

    async def reload(request: Request) -> JSONResponse:
        actor = await identify(request) or ANONYMOUS
        try:
            edition = await editions.reload(actor=actor)
        except ValueError as error:
            raise bad_request(f"Nothing was reloaded. {error}", code="reload_refused") from None
        return _told(edition.to_json())

    async def tell(request: Request) -> JSONResponse:
        await identify(request)
        return _told(editions.current.to_json())

    extra = described(EditionFacts, takes=Nothing)
    api.add_api_route("/v1/admin/reload", reload, methods=["POST"], openapi_extra=extra)
    extra = described(EditionFacts)
    api.add_api_route("/v1/admin/edition", tell, methods=["GET"], openapi_extra=extra)


def _number(request: Request, name: str, kind: type[Number]) -> Number | None:
    """Return a parameter of the query; `ApiError` 400 if it is none that could be meant."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = kind(-1)
    if not 0 < value < 2**53:
        raise bad_request(f"{name}: {text[:40]!r} is not a positive number", name)
    return value


def _told(content: dict[str, Any]) -> JSONResponse:
    # A key is shown once: nobody in between keeps it.
    return JSONResponse(content, headers={"cache-control": "no-store"})


def _listed(found: Sequence[keys.Key | keys.Team | AuditRow]) -> JSONResponse:
    return _told({"object": "list", "data": [one.model_dump() for one in found]})
