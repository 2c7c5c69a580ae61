"""Tells who sends a request, by the key that it brings, with a short-lived cache."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import sqlalchemy as sa
from pydantic import Field
from starlette.requests import Request

from policies.kinds import Strict
from router.access.keys import PREFIX, Key, Scope, find_key, hash_secret
from router.ledger.database import Database
from router.ledger.schema import API_KEYS

# Tells the key id of who sends a request, None for an anonymous one. Raises `KeyRejected`.
Identify: TypeAlias = Callable[[Request], Awaitable[str | None]]

_MOST_CACHED = 10_000


class AuthConfig(Strict):
    """The `auth:` section of the server's configuration.

    With `required` every request needs a key. Without, requests that bring none (or another
    service's) are anonymous and may do everything: that is for loopback. One that brings a key of
    ours is still checked, and counted under it.
    A revoked key stops working, and changed caps hold, within `cache_s`.
    """

    required: bool = False
    cache_s: float = Field(2.0, ge=0, le=60)


class KeyRejected(Exception):
    """A request that may not pass; `status` is 401 (who are you?) or 403 (not with this key)."""

    def __init__(self, message: str, status: int = 401) -> None:
        super().__init__(message, status)
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return self.message


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
        key = await self._look_up(hash_secret(secret))
        if key is None:
            raise KeyRejected("The API key is not known, or was revoked.")
        if scope == "admin" and key.scope != "admin":
            raise KeyRejected(f"The API key {key.name!r} is not an admin's.", 403)
        return key

    async def known(self, key_id: str) -> Key:
        """Return the key with this id; raises `KeyRejected` where it was revoked since."""
        key = await self._find(API_KEYS.c.key_id == key_id)
        if key is None:
            raise KeyRejected("The API key is not known, or was revoked.")
        return key

    async def _look_up(self, sha256: str) -> Key | None:
        now_s = self._clock()
        key, fresh_until_s = self._cache.get(sha256, (None, -1.0))
        if now_s < fresh_until_s:
            return key
        key = await self._find(API_KEYS.c.sha256 == sha256)
        if len(self._cache) >= _MOST_CACHED:
            self._cache.clear()  # someone guesses keys; the real ones come back with one query
        self._cache[sha256] = (key, now_s + self._config.cache_s)
        return key

    async def _find(self, chosen: sa.ColumnElement[bool]) -> Key | None:
        return await self._database.calls.run(find_key, self._database, chosen)


def credentials(headers: Mapping[str, str]) -> str | None:
    """Return what a request says of itself as OpenAI's clients do; Anthropic's use `x-api-key`."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else None)


def _secret(header: str | None) -> str | None:
    scheme, _, secret = (header or "").partition(" ")
    secret = secret.strip()
    return secret if scheme.lower() == "bearer" and secret else None
