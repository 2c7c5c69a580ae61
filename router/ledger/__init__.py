"""The ledger: one durable row per request, and what is derived from the rows.

`database` opens it, `schema` has its tables, `writer` records off the request path, `queries` sums
and reads, `feedback` joins what users thought of an answer, `export` hands the rows on. The names
by which rows are grouped, counted and written stand here, where they cost nothing to import.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, cast, get_args

GroupBy: TypeAlias = Literal[
    "day",
    "hour",
    "key",
    "team",
    "model",
    "policy",
    "members",
    "experiment",
    "arm",
    "endpoint",
    "status",
    "method",
    "price",
]
Unit: TypeAlias = Literal["usd", "wh", "joules", "gco2e", "tokens", "requests"]
Format: TypeAlias = Literal["parquet", "csv", "jsonl", "outcomes"]


class LedgerError(ValueError):
    """A ledger that cannot be used as asked; the message names what, and what is allowed."""


def read_groups(text: str) -> tuple[GroupBy, ...]:
    """Read names to group by, separated by commas; `LedgerError` for an unknown one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in get_args(GroupBy):
            raise LedgerError(
                f"by: {name!r} is unknown; allowed are {', '.join(get_args(GroupBy))}"
            )
    return cast("tuple[GroupBy, ...]", names)
