"""Hands the ledger's rows on as Parquet, CSV or JSON Lines; and removes old ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from policies.files import replacing
from router.ledger.database import Database, writing
from router.ledger.errors import LedgerError
from router.ledger.names import Format
from router.ledger.outcomes import outcomes
from router.ledger.queries import ALWAYS, Period, requests
from router.ledger.schema import FEEDBACK, REQUESTS

_ROWS_PER_GROUP = 10_000
_PRUNED_PER_TRANSACTION = 5_000
_NAMES = tuple(column.name for column in REQUESTS.columns)
_JSON_NAMES = {column.name for column in REQUESTS.columns if isinstance(column.type, sa.JSON)}


def export(database: Database, target: Path, *, format: Format, period: Period = ALWAYS) -> int:
    """Write the rows of `period`, in order of time, to `target`; return how many.

    Memory stays constant however many there are, and `target` appears (or is replaced) only once
    it is complete. Nested columns are JSON text in CSV and Parquet. "outcomes" are the answers
    that users scored, as routers learn from them (JSON Lines). Raises `PolicyError` where the
    folder is missing, `LedgerError` where Parquet is asked for without pyarrow.
    """
    source: Generator[dict[str, Any]] = (
        _scored(database, period) if format == "outcomes" else requests(database, period=period)
    )
    with replacing(target) as temporary, closing(source) as rows:
        return _WRITERS[format](temporary, rows)


def prune(database: Database, *, before_s: float) -> int:
    """Delete the requests (with their feedback) that arrived before `before_s`; return how many.

    In small transactions, so that a running server's own writes are never held up for long.
    """
    old = (
        sa.select(REQUESTS.c.request_id)
        .where(REQUESTS.c.time_s < before_s)
        .limit(_PRUNED_PER_TRANSACTION)
    )
    total = 0
    while True:
        with writing(database) as connection:
            ids = connection.execute(old).scalars().all()
            connection.execute(sa.delete(FEEDBACK).where(FEEDBACK.c.request_id.in_(ids)))
            connection.execute(sa.delete(REQUESTS).where(REQUESTS.c.request_id.in_(ids)))
        total += len(ids)
        if len(ids) < _PRUNED_PER_TRANSACTION:
            return total


def _scored(database: Database, period: Period) -> Generator[dict[str, Any]]:
    with closing(outcomes(database, period=period, only_with_feedback=True)) as scored:
        for outcome in scored:
            if line := outcome.to_line():
                yield line


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    num_rows = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=_NAMES)
        writer.writeheader()
        for row in rows:
            writer.writerow(_flat(row))
            num_rows += 1
    return num_rows


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    try:
        import pyarrow as pa  # noqa: PLC0415 (an extra)
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise LedgerError(
            "export: Parquet needs the package pyarrow: pip install 'shoal[parquet]'"
        ) from None
    schema = pa.schema([(column.name, _arrow_type(pa, column)) for column in REQUESTS.columns])
    num_rows = 0
    with pq.ParquetWriter(path, schema) as writer:
        for group in _groups(map(_flat, rows), _ROWS_PER_GROUP):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            num_rows += len(group)
    return num_rows


_WRITERS: dict[str, Callable[[Path, Iterable[dict[str, Any]]], int]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "jsonl": _write_jsonl,
    "outcomes": _write_jsonl,
}


def _arrow_type(pa: Any, column: sa.Column[Any]) -> object:  # noqa: ANN401 (an optional module)
    if isinstance(column.type, sa.Double):
        return pa.float64()
    if isinstance(column.type, sa.Boolean):
        return pa.bool_()
    if isinstance(column.type, sa.Integer):
        return pa.int64()
    return pa.string()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: json.dumps(value) if name in _JSON_NAMES and value is not None else value
        for name, value in row.items()
    }


def _groups(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while group := list(islice(iterator, size)):
        yield group
