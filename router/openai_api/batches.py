"""`/v1/batches`: offline work over files, as rows of the ledger's database.

Any replica takes a batch that nobody holds: it has a lease, which it renews while it lives
(`router.batching` does the work). So a batch goes on after a restart, elsewhere if need be.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import sqlalchemy as sa
from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from policies.json_text import read_json_text
from router.access.authentication import Identify
from router.bodies import Bodies, has_more_values
from router.errors import ApiError, bad_request
from router.ledger.database import Database, writing
from router.ledger.schema import BATCHES
from router.openai_api.fields import Metadata, read_fields, read_json
from router.openai_api.files import PURPOSE, FileStore, page, unknown_file
from router.openapi import Listing, Page, described

LEASE_S = 30.0
_DAY_S = 86_400.0
_LOCK = 5_350_004
_MOST_KEPT = 10_000  # of one key
_MOST_LISTED = 100  # OpenAI's
_MOST_OPEN = 100  # of one key
_MOST_ID_CHARACTERS = 512
# What a line may have around its body.
_FRAME_BYTES, _FRAME_VALUES = 2**14, 64
OPEN = ("validating", "in_progress", "finalizing", "cancelling")

# The times that OpenAI's object tells, by the statuses that begin at them.
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class BatchFields(BaseModel):
    """The body of a new batch."""

    model_config = ConfigDict(strict=True, extra="allow")

    input_file_id: str = Field(min_length=1, max_length=256)
    endpoint: str = Field(max_length=256)
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class BatchStore:
    """The batches of `database`; all methods block."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(self, fields: BatchFields, key_id: str | None) -> dict[str, Any]:
        """Begin a batch; raises `ApiError` where its key has too many."""
        now_s = time.time()
        row = {
            "batch_id": f"batch_{secrets.token_hex(12)}",
            "key_id": key_id,
            "endpoint": fields.endpoint,
            "input_file_id": fields.input_file_id,
            "status": "validating",
            "created_s": now_s,
            "expires_s": now_s + _DAY_S,
            "times": {},
            "metadata": fields.metadata,
            "num_total": 0,
            "num_completed": 0,
            "num_failed": 0,
            "lease_s": 0.0,
        }
        with writing(self.database) as connection:
            open_ones = sa.select(sa.func.count()).where(
                BATCHES.c.key_id.is_not_distinct_from(key_id), BATCHES.c.status.in_(OPEN)
            )
            if connection.execute(open_ones).scalar_one() >= _MOST_OPEN:
                raise ApiError(
                    429,
                    f"At most {_MOST_OPEN} batches may be under way; wait for one to end.",
                    kind="rate_limit_error",
                    code="too_many_batches",
                )
            connection.execute(sa.insert(BATCHES).values(**row))
            # Nobody is told of more; one whose file is no batch costs its key nothing.
            surplus = (
                sa.select(BATCHES.c.batch_id)
                .where(BATCHES.c.key_id.is_not_distinct_from(key_id), BATCHES.c.status.not_in(OPEN))
                .order_by(BATCHES.c.created_s.desc())
                .offset(_MOST_KEPT)
            )
            connection.execute(sa.delete(BATCHES).where(BATCHES.c.batch_id.in_(surplus)))
        found = self.find(row["batch_id"], key_id)
        assert found is not None
        return found

    def find(self, batch_id: object, key_id: str | None) -> dict[str, Any] | None:
        """Return a batch of `key_id`."""
        wanted = sa.select(BATCHES).where(
            BATCHES.c.batch_id == batch_id, BATCHES.c.key_id.is_not_distinct_from(key_id)
        )
        return self.database.row(wanted)

    def of_key(self, key_id: str | None) -> list[str]:
        """Return the ids of the batches of `key_id`, newest first."""
        wanted = (
            sa.select(BATCHES.c.batch_id)
            .where(BATCHES.c.key_id.is_not_distinct_from(key_id))
            .order_by(BATCHES.c.created_s.desc())
            .limit(_MOST_KEPT)
        )
        return [row["batch_id"] for row in self.database.rows(wanted)]

    def rows(self, batch_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Return the batches that are so called and there, in this order."""
        wanted = sa.select(BATCHES).where(BATCHES.c.batch_id.in_(batch_ids))
        rows = {row["batch_id"]: row for row in self.database.rows(wanted)}
        return [rows[batch_id] for batch_id in batch_ids if batch_id in rows]

    def num_left(self, usual: int) -> int:
        """Return how many lines of all open batches have no result; one unchecked has `usual`."""
        columns = BATCHES.c
        unchecked = columns.status == "validating"
        left = columns.num_total - columns.num_completed - columns.num_failed
        total = sa.select(sa.func.sum(sa.case((unchecked, usual), else_=left)))
        with self.database.connect() as connection:
            return int(connection.execute(total.where(columns.status.in_(OPEN))).scalar() or 0)

    def prune(self, before_s: float) -> int:
        """Delete the batches that began before then and are over; return how many."""
        old = BATCHES.c.status.not_in(OPEN) & (BATCHES.c.created_s < before_s)
        with writing(self.database) as connection:
            return connection.execute(sa.delete(BATCHES).where(old)).rowcount

    def claim(self, holder: str) -> dict[str, Any] | None:
        """Return the oldest batch that nobody works on, now `holder`'s; None if there is none."""
        now_s = time.time()
        free = (
            sa.select(BATCHES)
            .where(BATCHES.c.status.in_(OPEN), BATCHES.c.lease_s < now_s)
            .order_by(BATCHES.c.created_s)
            .limit(1)
        )
        if self.database.row(free) is None:
            return None  # without writing anything: every replica looks all the time
        with writing(self.database, lock=_LOCK) as connection:
            row = connection.execute(free).mappings().first()
            if row is None:
                return None
            taken = sa.update(BATCHES).where(BATCHES.c.batch_id == row["batch_id"])
            connection.execute(taken.values(holder=holder, lease_s=now_s + LEASE_S))
        return dict(row)

    def renew(self, batch_id: str, holder: str, *, num_completed: int, num_failed: int) -> str:
        """Renew `holder`'s lease, tell how far it got, and return the status; empty: lost it."""
        with writing(self.database) as connection:
            kept = connection.execute(
                sa.update(BATCHES)
                .where(BATCHES.c.batch_id == batch_id, BATCHES.c.holder == holder)
                .values(
                    lease_s=time.time() + LEASE_S,
                    num_completed=num_completed,
                    num_failed=num_failed,
                )
            )
            status = sa.select(BATCHES.c.status).where(BATCHES.c.batch_id == batch_id)
            return str(connection.execute(status).scalar()) if kept.rowcount else ""

    def release(self, batch_id: str, holder: str) -> None:
        """Let others go on with the batch at once."""
        with writing(self.database) as connection:
            held = (BATCHES.c.batch_id == batch_id) & (BATCHES.c.holder == holder)
            connection.execute(sa.update(BATCHES).where(held).values(holder=None, lease_s=0.0))

    def move(
        self, batch_id: str, status: str, *, among: Sequence[str] = OPEN, **values: object
    ) -> bool:
        """Give a batch a new `status`, and `values`, if it has one `among` those; return whether.

        The time at which a status begins is kept.
        """
        with writing(self.database, lock=_LOCK) as connection:
            found = BATCHES.c.batch_id == batch_id
            row = connection.execute(sa.select(BATCHES).where(found)).mappings().first()
            if row is None or row["status"] not in among:
                return False
            times = {**(row["times"] or {}), status: time.time()}
            told = sa.update(BATCHES).where(found).values(status=status, times=times, **values)
            connection.execute(told)
        return True


def add_batch_routes(
    api: FastAPI,
    store: BatchStore,
    files: FileStore,
    *,
    endpoints: Collection[str],
    identify: Identify,
    bodies: Bodies,
) -> None:
    """Add what begins, tells and cancels batches over `endpoints`, given by path."""
    calls = store.database.calls

    async def create(request: Request) -> JSONResponse:
        key_id = await identify(request)
        fields = await bodies.take(request, _read, key_id)
        if fields.endpoint not in endpoints:
            raise bad_request(
                f"endpoint: {fields.endpoint!r} is not supported; allowed are "
                f"{', '.join(endpoints)}",
                "endpoint",
            )
        file = await calls.run(files.find, fields.input_file_id, key_id)
        if file is None:
            raise unknown_file(fields.input_file_id, "input_file_id")
        if file["purpose"] != PURPOSE:
            raise bad_request(f"input_file_id: its purpose is not {PURPOSE}", "input_file_id")
        return JSONResponse(to_json(await calls.run(store.add, fields, key_id)))

    async def found(request: Request, batch_id: str) -> dict[str, Any]:
        row = await calls.run(store.find, batch_id, await identify(request))
        if row is None:
            raise ApiError(
                404,
                f"There is no batch {batch_id[:80]!r} here for you.",
                param="batch_id",
                code="batch_not_found",
            )
        return row

    async def every(request: Request) -> JSONResponse:
        ids = await calls.run(store.of_key, await identify(request))
        # Whole batches are read for the page alone: a key's may take a hundred megabytes.
        listed = page(
            [{"id": one} for one in ids], request.query_params, usual=20, most=_MOST_LISTED
        )
        rows = await calls.run(store.rows, [one["id"] for one in listed["data"]])
        return JSONResponse({**listed, "data": [to_json(row) for row in rows]})

    async def one(request: Request, batch_id: str) -> JSONResponse:
        return JSONResponse(to_json(await found(request, batch_id)))

    async def cancel(request: Request, batch_id: str) -> JSONResponse:
        row = await found(request, batch_id)
        among = ("validating", "in_progress")
        if not await calls.run(store.move, batch_id, "cancelling", among=among) and row[
            "status"
        ] not in ("cancelling", "cancelled"):
            raise ApiError(
                409, f"The batch is {row['status']} already.", param="batch_id", code="batch_over"
            )
        return JSONResponse(to_json(await found(request, batch_id)))

    for path, method, answer, extra in (
        ("/v1/batches", "POST", create, described(BatchFacts, takes=BatchFields)),
        ("/v1/batches", "GET", every, described(BatchList, query=("limit", "after"))),
        ("/v1/batches/{batch_id}", "GET", one, described(BatchFacts)),
        ("/v1/batches/{batch_id}/cancel", "POST", cancel, described(BatchFacts)),
    ):
        api.add_api_route(path, answer, methods=[method], openapi_extra=extra)


def _read(body: bytes) -> BatchFields:
    return read_fields(BatchFields, read_json(body), {"output_expires_after": ()})


class BatchErrorFacts(BaseModel):
    """What is wrong with a line of the input, counted from 1."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(Listing):
    """What is wrong with the input."""

    data: list[BatchErrorFacts]


class BatchCounts(BaseModel):
    """How many lines there are, and how many have been answered or have failed."""

    total: int
    completed: int
    failed: int


class BatchFacts(BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None


class BatchList(Page):
    """A key's batches, newest first."""

    data: list[BatchFacts]


def to_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch as OpenAI has it; what it writes is told once it is over."""
    times = row["times"] or {}
    over = row["status"] not in OPEN
    return {
        "id": row["batch_id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "errors": {"object": "list", "data": row["errors"]} if row["errors"] else None,
        "input_file_id": row["input_file_id"],
        "completion_window": "24h",
        "status": row["status"],
        "output_file_id": row["output_file_id"] if over else None,
        "error_file_id": row["error_file_id"] if over else None,
        "created_at": int(row["created_s"]),
        "expires_at": int(row["expires_s"]),
        **{f"{name}_at": int(times[name]) if name in times else None for name in _TIMES},
        "request_counts": {
            "total": row["num_total"],
            "completed": row["num_completed"],
            "failed": row["num_failed"],
        },
        "metadata": row["metadata"],
    }


def most_line_bytes(bodies: Bodies) -> int:
    """Return how long a line of a batch's input may be."""
    return bodies.max_bytes + _FRAME_BYTES


def line_problem(line: bytes, endpoint: str, known: set[str], bodies: Bodies) -> ApiError | None:
    """Return what is wrong with a line of a batch's input; its id is `known` from then on.

    While it is parsed nothing else runs: it is bounded before, as a request's body is.
    """
    too_much = _too_much(line, bodies)
    if too_much is not None:
        return too_much
    try:
        asked = read_json_text(line)
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        return bad_request("the line is no JSON object", code="invalid_json_line")
    custom_id = asked.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MOST_ID_CHARACTERS:
        return bad_request("custom_id: a string is needed", "custom_id")
    if custom_id in known:
        return bad_request(
            f"custom_id: {custom_id[:80]!r} is there twice", "custom_id", "duplicate_custom_id"
        )
    known.add(custom_id)
    if asked.get("method") != "POST":
        return bad_request("method: only POST is allowed", "method", "invalid_method")
    if asked.get("url") != endpoint:
        return bad_request(f"url: the batch is for {endpoint}", "url", "mismatched_url")
    if not isinstance(asked.get("body"), dict):
        return bad_request("body: an object is needed", "body")
    return None


def _too_much(line: bytes, bodies: Bodies) -> ApiError | None:
    most = most_line_bytes(bodies)
    if len(line) > most:
        message = f"the line is over {most} bytes (limits.max_body_bytes)"
        return bad_request(message, code="line_too_long")
    if has_more_values(line, bodies.max_values + _FRAME_VALUES):
        message = f"the line holds over {bodies.max_values} JSON values (limits.max_body_values)"
        return bad_request(message, code="body_too_complex")
    return None
