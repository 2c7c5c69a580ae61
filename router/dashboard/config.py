"""The `dashboard:` section of the server's configuration."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Access: TypeAlias = Literal["key", "loopback", "anyone"]


class DashboardConfig(BaseModel):
    """Who may see the figures of `GET /dashboard`, which are those of all users together.

    `access` "key" asks for an admin's key. "loopback" asks for none of those who come from this
    machine by one of its own names (localhost, 127.0.0.1, ::1); `shoal serve` takes it where it
    listens on loopback only and the file does not say. "anyone" is for a server behind a proxy
    that authenticates. Where `auth.required`, a key is needed all the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    access: Access = "key"

    def listening_on(self, host: str) -> DashboardConfig:
        """Return what holds for a server that listens on `host` and nowhere else."""
        if "access" in self.model_fields_set or host not in LOOPBACK:
            return self
        return self.model_copy(update={"access": "loopback"})
