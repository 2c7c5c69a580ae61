"""API keys: made once, shown once, kept as a hash, checked with a short-lived cache.

A key is "sk-shoal-" and 256 random bits, so its plain SHA-256 cannot be reversed by guessing, and
looking it up by that hash leaks nothing through timing. Neither the key nor the hash is ever
logged; `prefix`, its first characters, is what people recognise it by.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import IntegrityError
from starlette.requests import Request

from router.access.limits import Cap, read_caps
from router.ledger.database import Database, writing
from router.ledger.schema import API_KEYS

Scope: TypeAlias = Literal["user", "admin"]
# Tells the key id of who sends a request, None for an anonymous one. Raises `KeyRejected`.
Identify: TypeAlias = Callable[[Request], Awaitable[str | None]]

PREFIX = "sk-shoal-"
_MOST_CACHED = 10_000
_LEAST_LENGTH = len(PREFIX) + 32


class AuthConfig(BaseModel):
    """The `auth:` section of the server's configuration.

    With `required` every request needs a key. Without, requests that bring none (or another
    service's) are anonymous and may do everything: that is for loopback. One that brings a key of
    ours is still checked, and counted under it.
    A revoked key stops working within `cache_s`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    required: bool = False
    cache_s: float = Field(2.0, ge=0, le=60)


class KeysError(ValueError):
    """A key that cannot be made or revoked as asked."""


class KeyRejected(Exception):
    """A request that may not pass; `status` is 401 (who are you?) or 403 (not with this key)."""

    def __init__(self, message: str, status: int = 401) -> None:
        super().__init__(message, status)
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key as the server knows it; the secret itself is nowhere. Times are Unix seconds."""

    id: str
    name: str
    prefix: str
    scope: Scope = "user"
    caps: tuple[Cap, ...] = ()
    created_s: float = 0.0
    revoked_s: float | None = None


def create_key(
    database: Database,
    *,
    name: str,
    scope: Scope = "user",
    caps: Mapping[str, float] | None = None,
    now_s: float | None = None,
    secret: str | None = None,
) -> tuple[Key, str]:
    """Make a key and return it with its secret, which cannot be had again.

    `caps` are as in "usd_per_day": 5. A `secret` that was drawn elsewhere takes the place of a new
    one. Raises `KeysError` for a name that is taken or empty or a secret too easy to guess,
    `CapError` for a cap that is not known.
    """
    if secret is not None and not (secret.startswith(PREFIX) and len(secret) >= _LEAST_LENGTH):
        raise KeysError(
            f"keys: the secret of {name!r} cannot be used; it is {PREFIX!r} and at least "
            f"{_LEAST_LENGTH - len(PREFIX)} random characters"
        )
    if not name.strip():
        raise KeysError("keys: the name is empty")
    if scope not in get_args(Scope):
        raise KeysError(f"keys: scope {scope!r} is unknown; allowed are user, admin")
    read = read_caps(caps or {}, f"keys.{name}")
    secret = secret or PREFIX + secrets.token_urlsafe(32)
    key = Key(
        id="key_" + secrets.token_hex(6),
        name=name,
        prefix=secret[: len(PREFIX) + 4],
        scope=scope,
        caps=read,
        created_s=time.time() if now_s is None else now_s,
    )
    row = {
        "key_id": key.id,
        "name": name,
        "prefix": key.prefix,
        "sha256": _hash(secret),
        "scope": scope,
        "caps": dict(caps or {}),
        "created_s": key.created_s,
    }
    try:
        with writing(database) as connection:
            connection.execute(sa.insert(API_KEYS).values(**row))
    except IntegrityError:
        raise KeysError(f"keys: the name {name!r} is taken; names are never reused") from None
    return key, secret


def import_key(database: Database, *, name: str, scope: Scope, secret: str) -> Key | None:
    """Make a key of a `secret` that was drawn elsewhere; None if it is known by that name already.

    Raises `KeysError` as `create_key` does, also where the name stands for another secret.
    """
    with database.connect() as connection:
        row = connection.execute(
            sa.select(API_KEYS).where(API_KEYS.c.sha256 == _hash(secret), API_KEYS.c.name == name)
        ).first()
    return None if row else create_key(database, name=name, scope=scope, secret=secret)[0]


def list_keys(database: Database) -> list[Key]:
    """Return all keys, revoked ones too, oldest first."""
    with database.connect() as connection:
        rows = connection.execute(sa.select(API_KEYS).order_by(API_KEYS.c.created_s)).all()
    return [_read(row) for row in rows]


def revoke_key(database: Database, id_or_name: str, *, now_s: float | None = None) -> Key:
    """Revoke a key for good; servers notice within their `cache_s`. Revoking twice is no error.

    Raises `KeysError` where there is no such key.
    """
    chosen = (API_KEYS.c.key_id == id_or_name) | (API_KEYS.c.name == id_or_name)
    with writing(database) as connection:
        connection.execute(
            sa.update(API_KEYS)
            .where(chosen, API_KEYS.c.revoked_s.is_(None))
            .values(revoked_s=time.time() if now_s is None else now_s)
        )
        row = connection.execute(sa.select(API_KEYS).where(chosen)).first()
    if row is None:
        raise KeysError(f"keys: there is no key {id_or_name!r}; `shoal keys list` shows them")
    return _read(row)


class Authenticator:
    """Tells who sends a request. `clock` counts monotonic seconds; used on one event loop."""

    def __init__(
        self,
        database: Database,
        config: AuthConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._config = config
        self._clock = clock
        self._cache: dict[str, tuple[Key | None, float]] = {}

    async def authenticate(self, header: str | None, *, scope: Scope = "user") -> Key | None:
        """Return the key that an Authorization header brings; None for an anonymous request.

        The database is asked off the event loop, at most every `cache_s` per key. Raises
        `KeyRejected` for a missing, unknown or revoked key, or one without `scope` (an admin's
        key may do everything that a user's may), `DatabaseUnavailable` where it cannot be asked.
        """
        secret = _secret(header)
        if secret is None or not (self._config.required or secret.startswith(PREFIX)):
            if self._config.required:
                raise KeyRejected(
                    "No API key was given: send the header 'Authorization: Bearer sk-shoal-...'."
                )
            return None
        key = await self._look_up(_hash(secret))
        if key is None:
            raise KeyRejected("The API key is not known, or was revoked.")
        if scope == "admin" and key.scope != "admin":
            raise KeyRejected(f"The API key {key.name!r} is not an admin's.", 403)
        return key

    async def known(self, key_id: str) -> Key:
        """Return the key with this id; raises `KeyRejected` where it was revoked since."""
        key = await self._database.calls.run(_find, self._database, API_KEYS.c.key_id == key_id)
        if key is None:
            raise KeyRejected("The API key is not known, or was revoked.")
        return key

    async def _look_up(self, sha256: str) -> Key | None:
        now_s = self._clock()
        key, fresh_until_s = self._cache.get(sha256, (None, -1.0))
        if now_s < fresh_until_s:
            return key
        key = await self._database.calls.run(_find, self._database, API_KEYS.c.sha256 == sha256)
        if len(self._cache) >= _MOST_CACHED:
            self._cache.clear()  # someone guesses keys; the real ones come back with one query
        self._cache[sha256] = (key, now_s + self._config.cache_s)
        return key


def _find(database: Database, chosen: sa.ColumnElement[bool]) -> Key | None:
    query = sa.select(API_KEYS).where(chosen, API_KEYS.c.revoked_s.is_(None))
    with database.connect() as connection:
        row = connection.execute(query).first()
    return None if row is None else _read(row)


def _read(row: sa.Row[tuple[object, ...]]) -> Key:
    return Key(
        id=row.key_id,
        name=row.name,
        prefix=row.prefix,
        scope=row.scope,
        caps=read_caps(row.caps or {}, f"caps of the key {row.name!r}"),
        created_s=row.created_s,
        revoked_s=row.revoked_s,
    )


def _secret(header: str | None) -> str | None:
    scheme, _, secret = (header or "").partition(" ")
    secret = secret.strip()
    return secret if scheme.lower() == "bearer" and secret else None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
