"""`/v1/files`: the files that batches read and write, in the ledger's database, for every replica.

A file is a row and its parts, in order. Of what a batch writes a part is the result of one line, by
the line's number: so a line's result is written once, however often it was worked out. Only the key
that a file belongs to sees it; files go when their time is over.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec

import sqlalchemy as sa
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response, StreamingResponse

from router.access.authentication import Identify
from router.bodies import Bodies
from router.config import BatchesConfig
from router.errors import ApiError, bad_request
from router.ledger.database import Database, writing
from router.ledger.schema import FILE_PARTS, FILES
from router.ledger.writer import insert_new
from router.openai_api.uploads import LEAST_KEPT_S, bounded, check_form, read_keep_s
from router.openapi import Page, described

P = ParamSpec("P")

_PART_BYTES = 2**18
_DAY_S = 86_400.0
_MOST_LISTED = 10_000
_ROW_BYTES = 2**10  # what even an empty file takes
PURPOSE, RESULTS = "batch", "batch_output"


class FileStore:
    """Keeps files in `database`, within the bounds of `config`."""

    def __init__(self, database: Database, config: BatchesConfig) -> None:
        self.database = database
        self.config = config
        # Uploads are written in turn, part by part: others need the database's few threads, too.
        self._turn = asyncio.Lock()

    async def add(
        self, upload: UploadFile, key_id: str | None, keep_s: float | None = None
    ) -> dict[str, Any]:
        """Keep what a client uploads for so long, None: as long as others; raises `ApiError`."""
        row = self.new_row(upload.filename or "batch.jsonl", PURPOSE, key_id)
        if keep_s is not None:
            row["expires_s"] = row["created_s"] + keep_s
        await self._write(self.begin, row)
        num_bytes = index = 0
        try:
            while data := await upload.read(_PART_BYTES):
                num_bytes += len(data)
                await self._write(self._append, row["file_id"], index, data)
                index += 1
            if not num_bytes:
                raise bad_request("file: it is empty", "file")
            await self._write(self.finish, row["file_id"])
        except BaseException:
            await self._write(self._delete, row["file_id"])
            raise
        return to_json({**row, "num_bytes": num_bytes})

    async def _write(
        self, write: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Write some of an upload when it is its turn."""
        async with self._turn:
            await self.database.calls.run(write, *args, **kwargs)

    def new_row(self, name: str, purpose: str, key_id: str | None) -> dict[str, Any]:
        """Return the row of a new file, which is not ready yet."""
        now_s = time.time()
        return {
            "file_id": f"file-{secrets.token_hex(12)}",
            "key_id": key_id,
            "filename": name[:256].replace("\0", ""),
            "purpose": purpose,
            "num_bytes": 0,
            "created_s": now_s,
            "expires_s": now_s + self.config.keep_days * _DAY_S,
            "ready": False,
        }

    def add_part(self, file_id: str, index: int, data: bytes) -> None:
        """Write part `index` of a file, unless it is there; blocks."""
        with writing(self.database) as connection:
            row = {"file_id": file_id, "part": index, "data": data}
            connection.execute(insert_new(connection, FILE_PARTS), row)

    def finish(self, file_id: str) -> int:
        """Show a file to its owner, or delete it if it is empty; return its size; blocks."""
        parts = FILE_PARTS.c.file_id == file_id
        size = sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(FILE_PARTS.c.data)), 0))
        with writing(self.database) as connection:
            num_bytes = int(connection.execute(size.where(parts)).scalar_one())
            of_file = FILES.c.file_id == file_id
            if num_bytes:
                told = sa.update(FILES).where(of_file).values(ready=True, num_bytes=num_bytes)
                connection.execute(told)
            else:
                connection.execute(sa.delete(FILES).where(of_file))
        return num_bytes

    def find(self, file_id: str, key_id: str | None) -> dict[str, Any] | None:
        """Return a file's row if it belongs to `key_id`; blocks."""
        wanted = sa.select(FILES).where(FILES.c.file_id == file_id, *_shown(key_id))
        return self.database.row(wanted)

    async def parts(self, file_id: str) -> AsyncGenerator[bytes, None]:
        """Yield a file's parts, one after the other."""
        after: int | None = -1
        while after is not None:
            found = await self.database.calls.run(self._part_after, file_id, after)
            after = None if found is None else found[0]
            if found is not None:
                yield found[1]

    async def lines(self, file_id: str, most_bytes: int) -> AsyncIterator[bytes]:
        """Yield a file's lines, empty ones too, and of each the first `most_bytes`."""
        begun = b""
        async for data in self.parts(file_id):
            *ends, rest = data.split(b"\n")
            for end in ends:
                yield (begun + end)[:most_bytes]
                begun = b""
            if len(begun) < most_bytes:
                begun += rest
        if begun:
            yield begun[:most_bytes]

    def done(self, file_ids: Sequence[str]) -> list[set[int]]:
        """Return the numbers of the parts that each file has; blocks."""
        with self.database.connect() as connection:
            wanted = sa.select(FILE_PARTS.c.part)
            return [
                set(connection.execute(wanted.where(FILE_PARTS.c.file_id == one)).scalars())
                for one in file_ids
            ]

    def prune(self) -> int:
        """Delete the files whose time is over; return how many; blocks."""
        with writing(self.database) as connection:
            old = sa.select(FILES.c.file_id).where(FILES.c.expires_s < time.time()).limit(100)
            gone = connection.execute(old).scalars().all()
            connection.execute(sa.delete(FILE_PARTS).where(FILE_PARTS.c.file_id.in_(gone)))
            connection.execute(sa.delete(FILES).where(FILES.c.file_id.in_(gone)))
        return len(gone)

    def begin(self, row: Mapping[str, Any]) -> None:
        """Begin a file that has no parts yet; raises `ApiError` where there is no room; blocks."""
        with writing(self.database) as connection:
            self._check_room(connection)
            connection.execute(sa.insert(FILES).values(**row))

    def _append(self, file_id: str, index: int, data: bytes) -> None:
        """Write the next part of an upload, which counts from then on: others come beside it."""
        with writing(self.database) as connection:
            self._check_room(connection)
            row = {"file_id": file_id, "part": index, "data": data}
            connection.execute(sa.insert(FILE_PARTS), row)
            larger = sa.update(FILES).where(FILES.c.file_id == file_id)
            connection.execute(larger.values(num_bytes=FILES.c.num_bytes + len(data)))

    def _check_room(self, connection: sa.Connection) -> None:
        sizes = sa.select(sa.func.sum(FILES.c.num_bytes + _ROW_BYTES))
        if int(connection.execute(sizes).scalar() or 0) > self.config.max_gb * 1e9:
            raise ApiError(
                413,
                f"All files together may take {self.config.max_gb:g} GB (batches.max_gb) and "
                "do; delete some.",
                code="storage_full",
            )

    def _part_after(self, file_id: str, after: int) -> tuple[int, bytes] | None:
        wanted = (
            sa.select(FILE_PARTS.c.part, FILE_PARTS.c.data)
            .where(FILE_PARTS.c.file_id == file_id, FILE_PARTS.c.part > after)
            .order_by(FILE_PARTS.c.part)
            .limit(1)
        )
        row = self.database.row(wanted)
        return None if row is None else (row["part"], bytes(row["data"]))

    def of_key(self, key_id: str | None, purpose: str | None) -> list[dict[str, Any]]:
        """Return the rows of a key's files, newest first; blocks."""
        wanted = sa.select(FILES).where(*_shown(key_id)).order_by(FILES.c.created_s.desc())
        if purpose is not None:
            wanted = wanted.where(FILES.c.purpose == purpose)
        return self.database.rows(wanted.limit(_MOST_LISTED))

    def delete(self, file_id: str, key_id: str | None) -> bool:
        """Delete a file of `key_id`; return whether there was one; blocks."""
        return self.find(file_id, key_id) is not None and self._delete(file_id)

    def _delete(self, file_id: str) -> bool:
        with writing(self.database) as connection:
            connection.execute(sa.delete(FILE_PARTS).where(FILE_PARTS.c.file_id == file_id))
            gone = connection.execute(sa.delete(FILES).where(FILES.c.file_id == file_id))
        return gone.rowcount == 1


def _shown(key_id: str | None) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        FILES.c.key_id.is_not_distinct_from(key_id),
        FILES.c.ready,
        FILES.c.expires_s > time.time(),
    )


class FileFacts(BaseModel):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: None


class FileList(Page):
    """A key's files, newest first."""

    data: list[FileFacts]


class DeletedFile(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: bool


def to_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file as OpenAI has it."""
    return {
        "id": row["file_id"],
        "object": "file",
        "bytes": row["num_bytes"],
        "created_at": int(row["created_s"]),
        "expires_at": int(row["expires_s"]),
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }


def add_file_routes(api: FastAPI, store: FileStore, *, identify: Identify, bodies: Bodies) -> None:
    """Add what uploads, tells, reads and deletes files."""
    calls = store.database.calls

    async def upload(request: Request) -> JSONResponse:
        key_id = await identify(request)
        check_form(request.headers.get("content-type", ""))
        most = int(store.config.max_file_mb * 1e6)
        with bodies.hold(request, key_id) as held:
            receive = bounded(request, most, bodies.timeout_s, held)
            return await _keep(store, Request(request.scope, receive), key_id)

    async def found(request: Request, file_id: str) -> dict[str, Any]:
        row = await calls.run(store.find, file_id, await identify(request))
        if row is None:
            raise unknown_file(file_id)
        return row

    async def every(request: Request) -> JSONResponse:
        rows = await calls.run(
            store.of_key, await identify(request), request.query_params.get("purpose")
        )
        return JSONResponse(page([to_json(row) for row in rows], request.query_params))

    async def one(request: Request, file_id: str) -> JSONResponse:
        return JSONResponse(to_json(await found(request, file_id)))

    async def content(request: Request, file_id: str) -> Response:
        await found(request, file_id)
        return StreamingResponse(store.parts(file_id), media_type="application/octet-stream")

    async def delete(request: Request, file_id: str) -> JSONResponse:
        if not await calls.run(store.delete, file_id, await identify(request)):
            raise unknown_file(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    form = {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "enum": [PURPOSE]},
            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            "expires_after[seconds]": {"type": "integer", "minimum": LEAST_KEPT_S},
        },
    }
    uploads = {
        **described(FileFacts),
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
    }
    query = ("purpose", "limit", "order", "after")
    bytes_ = described(None, media_type="application/octet-stream")
    for path, method, answer, extra in (
        ("/v1/files", "POST", upload, uploads),
        ("/v1/files", "GET", every, described(FileList, query=query)),
        ("/v1/files/{file_id}", "GET", one, described(FileFacts)),
        ("/v1/files/{file_id}", "DELETE", delete, described(DeletedFile)),
    ):
        api.add_api_route(path, answer, methods=[method], openapi_extra=extra)
    api.add_api_route(
        "/v1/files/{file_id}/content",
        content,
        methods=["GET"],
        response_class=StreamingResponse,
        openapi_extra=bytes_,
    )


async def _keep(store: FileStore, request: Request, key_id: str | None) -> JSONResponse:
    """Keep the file of a form that `key_id` sends; raises `ApiError`."""
    async with request.form(max_files=1, max_fields=8) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise bad_request("file is missing", "file", "missing_required_parameter")
        if purpose != PURPOSE:
            raise bad_request(
                f"purpose: {str(purpose)[:40]!r} is not supported; allowed is {PURPOSE}", "purpose"
            )
        keep_s = read_keep_s(form, store.config.keep_days * _DAY_S)
        return JSONResponse(await store.add(file, key_id, keep_s))


def unknown_file(file_id: str, param: str = "id") -> ApiError:
    """Return the error for a file that is not there, or not for who asks."""
    return ApiError(
        404, f"There is no file {file_id[:80]!r} here for you.", param=param, code="file_not_found"
    )


def page(
    listed: list[dict[str, Any]],
    query: Mapping[str, str],
    *,
    usual: int = 100,
    most: int = _MOST_LISTED,
) -> dict[str, Any]:
    """Return one page of what is `listed` newest first; raises `ApiError`, 400."""
    limit, order = query.get("limit", str(usual)), query.get("order", "desc")
    # Of thousands of digits Python makes no number.
    if not limit.isdecimal() or len(limit) > 9 or not 1 <= int(limit) <= most:
        raise bad_request(f"limit: {limit[:20]!r} is not in [1, {most}]", "limit")
    if order not in ("asc", "desc"):
        raise bad_request(f"order: {order[:20]!r} is unknown; allowed are asc, desc", "order")
    left = listed if order == "desc" else listed[::-1]
    after = query.get("after")
    if after is not None:
        ids = [item["id"] for item in left]
        if after not in ids:
            raise bad_request(f"after: there is nothing called {after[:80]!r}", "after")
        left = left[ids.index(after) + 1 :]
    shown = left[: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(left) > len(shown),
    }
