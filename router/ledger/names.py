"""The names by which rows are grouped, counted and written; cheap to import."""

from __future__ import annotations

from typing import Literal, TypeAlias, cast, get_args

from router.ledger.errors import LedgerError

GroupBy: TypeAlias = Literal[
    "day",
    "hour",
    "key",
    "model",
    "policy",
    "members",
    "experiment",
    "arm",
    "endpoint",
    "status",
    "method",
]
Unit: TypeAlias = Literal["usd", "wh", "gco2e", "tokens", "requests"]
Format: TypeAlias = Literal["parquet", "csv", "jsonl", "outcomes"]


def read_groups(text: str) -> tuple[GroupBy, ...]:
    """Read names to group by, separated by commas; `LedgerError` for an unknown one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in get_args(GroupBy):
            raise LedgerError(
                f"by: {name!r} is unknown; allowed are {', '.join(get_args(GroupBy))}"
            )
    return cast("tuple[GroupBy, ...]", names)
