"""The `budgets:` section of the server's configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from router.caps.limits import Cap, read_caps


class BudgetsConfig(BaseModel):
    """Caps, as in {"usd_per_day": 5, "tokens_per_minute": 20000}; windows are UTC's.

    `server` bounds all requests together, `per_key` every key that has no cap of that name of its
    own. A request that doesn't fit only because others in flight hold the rest waits at most
    `wait_s` for them. What a replica holds when it dies comes back after `lease_s`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    server: dict[str, float] = Field(default_factory=dict)
    per_key: dict[str, float] = Field(default_factory=dict)
    wait_s: float = Field(2.0, ge=0, le=60)
    lease_s: float = Field(15.0, ge=1, le=3600)

    @field_validator("server", "per_key")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        read_caps(value, "caps")
        return value

    def server_caps(self) -> tuple[Cap, ...]:
        """Return the caps of all requests together."""
        return read_caps(self.server, "budgets.server")

    def key_caps(self, own: tuple[Cap, ...]) -> tuple[Cap, ...]:
        """Return the caps of a key with caps of its `own`."""
        named = {cap.name: cap for cap in read_caps(self.per_key, "budgets.per_key")}
        return tuple((named | {cap.name: cap for cap in own}).values())
