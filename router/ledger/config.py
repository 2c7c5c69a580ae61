"""The `ledger:` section of the server's configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from router.ledger.database import database_url

DEFAULT_URL = "sqlite:///shoal.db"


class LedgerConfig(BaseModel):
    """Where rows go and how eagerly.

    `url` is any SQLAlchemy address of SQLite or PostgreSQL; a relative file is made absolute
    here, since replicas may run in another folder. A row reaches the database at most
    `flush_interval_s` after its request ended. At most `queue_rows` rows wait (while the database
    is down, say); later ones are counted as dropped. `keep_text` also stores the last user
    message and the answer, which retraining a router needs; without it no text is stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(DEFAULT_URL, validate_default=True)
    flush_interval_s: float = Field(0.2, gt=0, le=60)
    queue_rows: int = Field(50_000, ge=1)
    keep_text: bool = False

    @field_validator("url")
    @classmethod
    def _usable(cls, value: str) -> str:
        return database_url(value)
