"""Who changed what, and when: a row per action of an administrator, kept for good.

A row is written in the transaction of the change itself, so neither is there without the other. It
holds no secret: what changed is shown as `GET` shows it.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa
from pydantic import BaseModel

from router.ledger.database import Database
from router.ledger.schema import AUDIT
from router.openapi import TOLD_WHOLE

Action: TypeAlias = Literal[
    "key.create", "key.change", "key.revoke", "team.create", "team.change", "reload"
]

ANONYMOUS = "anonymous"  # this machine's own, where a server on loopback asks for no key


class AuditRow(BaseModel):
    """One action: `actor` is the id of an admin's key, or `os:` and the user of a command line.

    `subject` is the id of what changed, `before` and `after` are what it was and became.
    """

    model_config = TOLD_WHOLE

    object: Literal["audit_row"] = "audit_row"
    audit_id: int
    time_s: float
    actor: str
    action: Action
    subject: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


def note(
    connection: sa.Connection,
    action: Action,
    *,
    after: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    actor: str | None = None,
) -> None:
    """Write a row within the transaction of the change, which made `before` into `after`.

    Both carry the `id` of what changed. The `actor` is by default who runs this process.
    """
    connection.execute(
        sa.insert(AUDIT).values(
            time_s=time.time(),
            actor=actor or _os_user(),
            action=action,
            subject=after["id"],
            before=before,
            after=after,
        )
    )


def read_audit(
    database: Database, *, since_s: float | None = None, before_id: int | None = None, most: int
) -> list[AuditRow]:
    """Return at most `most` rows, the latest first; blocks.

    Only those from `since_s` on, and with ids below `before_id` (the last one's of a page shows
    the next page).
    """
    query = sa.select(AUDIT).order_by(AUDIT.c.audit_id.desc()).limit(most)
    if since_s is not None:
        query = query.where(AUDIT.c.time_s >= since_s)
    if before_id is not None:
        query = query.where(AUDIT.c.audit_id < before_id)
    return [AuditRow(**row) for row in database.rows(query)]


def _os_user() -> str:
    try:
        return f"os:{getpass.getuser()}"
    except (KeyError, OSError):  # a user id without a name, as containers have
        return f"os:{os.getuid()}"
