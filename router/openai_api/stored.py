"""Responses that are kept: for who asks for one again, or goes on from it.

Each is kept with the whole conversation that led to it, so that nothing else must still be there
when somebody goes on. Only the key that asked sees it; it goes when its time is over, or when all
take too much room, the oldest first. Any replica finds it, since the ledger's database has it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from fastapi import FastAPI, Request
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse
from starlette.responses import Response as HttpResponse

from router.access.authentication import Identify
from router.config import ResponsesConfig
from router.errors import ApiError, bad_request
from router.ledger.database import Database, writing
from router.ledger.schema import RESPONSES
from router.ledger.writer import insert_new
from router.openai_api.files import page
from router.openai_api.shapes import Response
from router.openapi import Page, described
from router.streams import in_json

logger = logging.getLogger(__name__)

_DAY_S = 86_400.0
_LOOK_S = 60.0  # how often old ones are looked for
_MOST_BYTES = 2**23  # of one conversation
_MOST_PER_LOOK = 1_000


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A response as it was told, and the items of the conversation that it answers."""

    response: Mapping[str, Any]
    items: Sequence[Mapping[str, Any]]


class ResponseStore:
    """Keeps responses in `database`, as `config` allows."""

    def __init__(self, database: Database, config: ResponsesConfig) -> None:
        self._database = database
        self._config = config

    @property
    def keeps_any(self) -> bool:
        """Whether any response is ever kept."""
        return self._config.store != "never"

    def keeps(self, asked: bool | None) -> bool:
        """Whether a response is kept whose request says `asked` of `store`."""
        return self.keeps_any and (
            self._config.store == "unless_refused" if asked is None else asked
        )

    async def add(self, kept: Kept, key_id: str | None) -> bool:
        """Keep a response for `key_id`; return whether that could be done. Never raises."""
        body, items = await asyncio.to_thread(_texts, kept)
        num_bytes = len(body) + len(items)
        if num_bytes > _MOST_BYTES:
            return False
        now_s = time.time()
        row = {
            "response_id": kept.response["id"],
            "key_id": key_id,
            "created_s": now_s,
            "expires_s": now_s + self._config.keep_days * _DAY_S,
            "num_bytes": num_bytes,
            "body": body,
            "items": items,
        }
        try:
            await self._database.calls.run(self._add, row)
        except SQLAlchemyError as error:
            logger.warning("the response %s is not kept: %s", row["response_id"], error)
            return False
        return True

    async def find(self, response_id: str, key_id: str | None) -> Kept | None:
        """Return what was kept for `key_id`; raises `DatabaseUnavailable`."""
        return await self._database.calls.run(self._find, response_id, key_id)

    async def delete(self, response_id: str, key_id: str | None) -> bool:
        """Forget a response; return whether there was one."""
        return await self._database.calls.run(self._delete, response_id, key_id)

    async def run(self) -> None:
        """Delete what is too old or too much until cancelled; log a failing database, go on."""
        while self.keeps_any:
            try:
                await self._database.reports.run(self.prune)
            except SQLAlchemyError as error:
                logger.warning("old responses stay for now: %s", error)
            await asyncio.sleep(_LOOK_S)

    def prune(self) -> int:
        """Delete responses whose time is over, and the oldest while all take too much; blocks."""
        num_deleted = 0
        with writing(self._database) as connection:
            old = sa.delete(RESPONSES).where(RESPONSES.c.expires_s < time.time())
            num_deleted += connection.execute(old).rowcount
            taken = connection.execute(sa.select(sa.func.sum(RESPONSES.c.num_bytes))).scalar() or 0
            excess = int(taken) - self._config.max_gb * 1e9
            oldest = sa.select(RESPONSES.c.response_id, RESPONSES.c.num_bytes).order_by(
                RESPONSES.c.created_s
            )
            gone: list[str] = []
            if excess > 0:
                for response_id, num_bytes in connection.execute(oldest.limit(_MOST_PER_LOOK)):
                    if excess <= 0:
                        break
                    gone.append(response_id)
                    excess -= num_bytes
            connection.execute(sa.delete(RESPONSES).where(RESPONSES.c.response_id.in_(gone)))
        return num_deleted + len(gone)

    def _add(self, row: Mapping[str, Any]) -> None:
        with writing(self._database) as connection:
            connection.execute(insert_new(connection, RESPONSES), row)

    def _find(self, response_id: str, key_id: str | None) -> Kept | None:
        wanted = sa.select(RESPONSES.c.body, RESPONSES.c["items"]).where(
            *_owned(response_id, key_id), RESPONSES.c.expires_s > time.time()
        )
        row = self._database.row(wanted)
        if row is None:
            return None
        return Kept(response=json.loads(row["body"]), items=json.loads(row["items"]))

    def _delete(self, response_id: str, key_id: str | None) -> bool:
        with writing(self._database) as connection:
            gone = connection.execute(sa.delete(RESPONSES).where(*_owned(response_id, key_id)))
        return gone.rowcount == 1


class DeletedResponse(BaseModel):
    """A response that is gone."""

    id: str
    object: Literal["response"]
    deleted: bool


class ItemList(Page):
    """Some of the items that a response answers, newest first unless asked otherwise."""

    data: list[dict[str, Any]]


def add_response_routes(api: FastAPI, store: ResponseStore, *, identify: Identify) -> None:
    """Add what reads and deletes kept responses."""

    async def found(request: Request, response_id: str) -> Kept:
        kept = await store.find(response_id, await identify(request))
        if kept is None:
            raise _unknown(response_id, store)
        return kept

    async def read(request: Request, response_id: str) -> HttpResponse:
        if request.query_params.get("stream", "false") != "false":
            raise bad_request("stream: a kept response is told whole", "stream")
        kept = await found(request, response_id)
        return await _told(lambda: kept.response)

    async def delete(request: Request, response_id: str) -> JSONResponse:
        if not await store.delete(response_id, await identify(request)):
            raise _unknown(response_id, store)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def cancel(request: Request, response_id: str) -> JSONResponse:
        await found(request, response_id)
        raise bad_request(
            "Only responses of background: true can be cancelled, which this server has none of; "
            "one that is being written ends when its client hangs up.",
            "response_id",
            "response_over",
        )

    async def items(request: Request, response_id: str) -> HttpResponse:
        kept = await found(request, response_id)

        def listed() -> dict[str, Any]:
            newest_first = _listed(kept.items, response_id)[::-1]
            return page(newest_first, request.query_params, usual=20)

        return await _told(listed)

    one = "/v1/responses/{response_id}"
    for path, method, answer, extra in (
        (one, "GET", read, described(Response)),
        (one, "DELETE", delete, described(DeletedResponse)),
        (f"{one}/cancel", "POST", cancel, described(Response)),
        (
            f"{one}/input_items",
            "GET",
            items,
            described(ItemList, query=("limit", "order", "after")),
        ),
    ):
        api.add_api_route(path, answer, methods=[method], openapi_extra=extra)


async def _told(make: Callable[[], object]) -> HttpResponse:
    """Return what may be megabytes, written on a thread."""
    return HttpResponse(await in_json(make, sys.maxsize), media_type="application/json")


def _unknown(response_id: str, store: ResponseStore) -> ApiError:
    why = "" if store.keeps_any else "; this server keeps none (responses.store)"
    return ApiError(
        404,
        f"There is no response {response_id[:80]!r} here for you{why}.",
        param="response_id",
        code="response_not_found",
    )


def _owned(response_id: str, key_id: str | None) -> tuple[sa.ColumnElement[bool], ...]:
    return RESPONSES.c.response_id == response_id, RESPONSES.c.key_id.is_not_distinct_from(key_id)


def _listed(items: Sequence[Mapping[str, Any]], response_id: str) -> list[dict[str, Any]]:
    """Return a conversation's items with ids and types, texts as lists of parts."""
    listed = []
    for index, item in enumerate(items):
        told = {"type": "message", **item}
        told["id"] = item.get("id") or f"item_{response_id.removeprefix('resp_')}_{index}"
        if isinstance(told.get("content"), str) and told["type"] == "message":
            kind = "output_text" if told.get("role") == "assistant" else "input_text"
            told["content"] = [{"type": kind, "text": told["content"]}]
        listed.append(told)
    return listed


def _texts(kept: Kept) -> tuple[str, str]:
    """Return the response and the items as JSON, ASCII alone, written piece by piece.

    Both databases hold escapes for what they cannot store as it is.
    """
    response = ",".join(f"{_text(key)}:{_text(value)}" for key, value in kept.response.items())
    return f"{{{response}}}", f"[{','.join(map(_text, kept.items))}]"


def _text(data: object) -> str:
    return json.dumps(data, separators=(",", ":"))
