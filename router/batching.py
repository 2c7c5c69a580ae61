"""Works on batches: each line a request like any other, but only while others leave room.

    claim a batch → check its lines → answer those that have no result yet → show the results

With `batches.wait_for` the rest of a batch waits for better hours (`may_wait`).

A line's result is a part of the batch's output or error file, by the line's number, and is written
once; after a restart, here or elsewhere, only lines without one are answered. (One whose answer was
not yet written is then asked for again.) Lines go through the same policies, keys, caps, engines
and records as requests that somebody waits for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response

from policies.carbon.grid import may_wait
from router.access.authentication import KeyRejected
from router.bodies import Bodies
from router.config import BatchesConfig
from router.errors import ApiError, bad_request, to_api_error
from router.ledger.calls import DatabaseUnavailable
from router.openai_api.batches import LEASE_S, BatchStore, line_problem, most_line_bytes
from router.openai_api.endpoint import WireFormat
from router.openai_api.files import RESULTS, FileStore

logger = logging.getLogger(__name__)

# What lines may ask for.
OFFLINE = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")

_LOOK_S = 1.0  # how often a batch is looked for, and how soon a cancellation is noticed
_PRUNE_S = 60.0
_COUNT_S = 10.0  # how often the lines that are left are counted
_TRIES_S = (0.5, 1, 2, 4, 8, 16, 30)  # the waits of a line that the server has no room for
_MOST_ERRORS = 20  # that are told of one file


class Answers(Protocol):
    """What answers a line."""

    num_waited_for: int

    async def offline(self, body: bytes, endpoint: WireFormat, key_id: str | None) -> Response:
        """Answer a body that nobody waits for; never raises but for cancellation."""
        ...


@dataclass(kw_only=True)
class _Work:
    """A batch under way; `done` are the numbers of the lines with an answer, and of those that
    failed. `num_before` of them were done before this began, at `began_s`; `waited_s` seconds
    since then it has waited for a better hour. `num_left` lines of all open batches had no result
    at `looked_s`. Seconds are of the monotonic clock.
    """

    row: Mapping[str, Any]
    output_id: str
    error_id: str
    done: list[set[int]]
    status: str = "in_progress"
    began_s: float = field(default_factory=time.monotonic)
    num_before: int = 0
    waited_s: float = 0.0
    num_left: int = 0
    looked_s: float = -math.inf

    @property
    def num_here(self) -> int:
        """How many lines have been done since this began."""
        return sum(map(len, self.done)) - self.num_before

    @property
    def left_s(self) -> float:
        """How long the lines that are left take at this batch's own pace so far."""
        answering_s = time.monotonic() - self.began_s - self.waited_s
        return self.num_left * answering_s / self.num_here

    @property
    def is_over(self) -> bool:
        """Whether no further line is to be answered: cancelled, lost or out of time."""
        return self.status != "in_progress" or time.time() > self.row["expires_s"]


class Batching:
    """Works on one batch at a time. `endpoints` are those that lines may name, by path.

    Lines are bounded as `bodies` are. `announced` tells how dear an hour to come is, where batches
    may wait for a better one.
    """

    def __init__(
        self,
        answers: Answers,
        *,
        endpoints: Mapping[str, WireFormat],
        batches: BatchStore,
        files: FileStore,
        config: BatchesConfig,
        bodies: Bodies,
        announced: Callable[[float], float | None] | None = None,
    ) -> None:
        self._answers = answers
        self._announced = announced
        self._endpoints = endpoints
        self._batches = batches
        self._files = files
        self._config = config
        self._bodies = bodies
        self._holder = f"{socket.gethostname()}-{secrets.token_hex(8)}"
        self._calls = batches.database.reports

    async def run(self) -> None:
        """Work until cancelled; what is under way then is left to others."""
        pruned_s = -_PRUNE_S
        while True:
            try:
                if time.monotonic() - pruned_s > _PRUNE_S:
                    pruned_s = time.monotonic()
                    await self._calls.run(self._files.prune)
                    kept_s = self._config.keep_days * 86_400
                    await self._calls.run(self._batches.prune, time.time() - kept_s)
                row = await self._calls.run(self._batches.claim, self._holder)
            except SQLAlchemyError as error:
                logger.warning("batches wait for the database: %s", error)
                row = None
            if row is None:
                await asyncio.sleep(_LOOK_S)
                continue
            try:
                await self._work_on(row)
            except SQLAlchemyError as error:
                logger.warning("the batch %s waits for the database: %s", row["batch_id"], error)
            finally:
                with suppress(SQLAlchemyError):
                    await self._calls.run(self._batches.release, row["batch_id"], self._holder)

    async def _work_on(self, row: Mapping[str, Any]) -> None:
        batch_id = row["batch_id"]
        if row["status"] == "validating":
            num_lines, errors = await self._check(row)
            if errors:
                among = ("validating",)
                await self._calls.run(
                    self._batches.move, batch_id, "failed", among=among, errors=errors
                )
                return
            row = {**row, **await self._begin(row, num_lines)}
        elif row["output_file_id"] is None:  # cancelled before it began
            await self._calls.run(self._batches.move, batch_id, "cancelled")
            return
        work = _Work(
            row=row,
            output_id=row["output_file_id"],
            error_id=row["error_file_id"],
            done=await self._done(row["output_file_id"], row["error_file_id"]),
            status="cancelling" if row["status"] == "cancelling" else "in_progress",
        )
        work.num_before = sum(map(len, work.done))
        watching = asyncio.create_task(self._watch(work))
        try:
            await self._answer_all(work)
        finally:
            watching.cancel()
        if work.status:  # it is still ours
            await self._finish(work)

    def _lines(self, row: Mapping[str, Any]) -> AsyncIterator[bytes]:
        return self._files.lines(row["input_file_id"], most_line_bytes(self._bodies) + 1)

    async def _done(self, *file_ids: str) -> list[set[int]]:
        return await self._calls.run(self._files.done, file_ids)

    async def _check(self, row: Mapping[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """Return how many lines the batch has, and what is wrong with them."""
        errors: list[dict[str, Any]] = []
        known: set[str] = set()
        num_lines = number = 0
        async for line in self._lines(row):
            number += 1
            if not line.strip():
                continue
            num_lines += 1
            if num_lines > self._config.max_requests:
                most = self._config.max_requests
                told: ApiError | None = bad_request(
                    f"a batch has at most {most} lines (batches.max_requests)"
                )
            else:
                told = await asyncio.to_thread(
                    line_problem, line, row["endpoint"], known, self._bodies
                )
            if told is not None:
                errors.append(
                    {
                        "code": told.code or "invalid_value",
                        "line": number,
                        "message": told.body()["error"]["message"],
                        "param": told.param,
                    }
                )
            if len(errors) >= _MOST_ERRORS or num_lines > self._config.max_requests:
                break
            if number % 1000 == 0:
                await self._renew(row["batch_id"])
        if not num_lines:
            message = "the input file is not there or has no lines"
            errors.append(
                {"code": "empty_file", "line": None, "message": message, "param": "input_file_id"}
            )
        return num_lines, errors

    async def _begin(self, row: Mapping[str, Any], num_lines: int) -> dict[str, Any]:
        """Make the files of results, which nobody sees yet; return what changed of the batch."""
        key_id, names = row["key_id"], ("output", "error")
        made = [
            self._files.new_row(f"{row['batch_id']}_{name}.jsonl", RESULTS, key_id)
            for name in names
        ]
        for file in made:
            await self._calls.run(self._files.begin, file)
        changed = {
            "output_file_id": made[0]["file_id"],
            "error_file_id": made[1]["file_id"],
            "num_total": num_lines,
        }
        among = ("validating",)
        moved = await self._calls.run(
            self._batches.move, row["batch_id"], "in_progress", among=among, **changed
        )
        if not moved:  # cancelled meanwhile
            await self._calls.run(self._batches.move, row["batch_id"], "cancelling", **changed)
        return {**changed, "status": "in_progress" if moved else "cancelling"}

    async def _answer_all(self, work: _Work) -> None:
        """Answer the lines that have no result yet, a few at once, until the batch is over."""
        running: set[asyncio.Task[None]] = set()
        try:
            number = -1
            async for line in self._lines(work.row):
                number += 1
                if not line.strip() or any(number in done for done in work.done):
                    continue
                while len(running) >= self._room() and not work.is_over:
                    running = await _some_done(running)
                await self._better_hour(work)
                if work.is_over:
                    break
                running.add(asyncio.create_task(self._answer(work, number, line)))
            while running and not work.is_over:
                running = await _some_done(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _better_hour(self, work: _Work) -> None:
        """Wait while what is left, of other batches too, had better be answered later.

        The first lines are answered at once, to see how long one takes.
        """
        if self._announced is None or work.num_here < self._config.concurrency:
            return
        while not work.is_over:
            now_s = time.monotonic()
            if now_s - work.looked_s > _COUNT_S:
                work.looked_s = now_s
                work.num_left = await self._calls.run(self._batches.num_left, work.row["num_total"])
            if not may_wait(
                self._announced,
                now_s=time.time(),
                until_s=work.row["expires_s"],
                work_s=work.left_s,
            ):
                return
            if not work.waited_s:
                logger.info("the batch %s waits for a better hour", work.row["batch_id"])
            await asyncio.sleep(_LOOK_S)
            work.waited_s += time.monotonic() - now_s

    def _room(self) -> int:
        return 1 if self._answers.num_waited_for else self._config.concurrency

    async def _answer(self, work: _Work, number: int, line: bytes) -> None:
        """Answer one line and write its result, unless the batch is over before."""
        asked, body = await asyncio.to_thread(_read, line)
        endpoint = self._endpoints[work.row["endpoint"]]
        for wait_s in (*_TRIES_S, None):
            most = self._bodies.max_bytes
            if len(body) > most:
                told = ApiError(413, f"The body is over {most} bytes.", code="body_too_large")
                answer = _refused(told, endpoint)
            elif asked["body"].get("stream"):
                told = bad_request("stream: a batch streams nothing", "stream")
                answer = _refused(told, endpoint)
            else:
                try:
                    answer = await self._answers.offline(body, endpoint, work.row["key_id"])
                except (KeyRejected, SQLAlchemyError) as error:
                    answer = _refused(to_api_error(error), endpoint)
            waits = answer.status_code in (429, 503)
            if wait_s is None or not waits or answer.headers.get("x-should-retry") == "false":
                break
            await asyncio.sleep(wait_s)
        response = {
            "status_code": answer.status_code,
            "request_id": answer.headers.get("x-request-id", ""),
        }
        # The body is JSON already, and may be megabytes.
        whole = json.dumps(response)[:-1].encode() + b', "body": ' + bytes(answer.body) + b"}"
        result = _result(asked["custom_id"], response=whole)
        await self._write(work, number, result, failed=answer.status_code != 200)

    async def _write(self, work: _Work, number: int, data: bytes, *, failed: bool) -> None:
        file_id = work.error_id if failed else work.output_id
        while True:
            try:
                await self._calls.run(self._files.add_part, file_id, number, data)
                break
            except DatabaseUnavailable as away:  # an answer has been paid for: wait
                await asyncio.sleep(max(away.retry_after_s, 0.1))
        work.done[failed].add(number)

    async def _watch(self, work: _Work) -> None:
        """Renew the lease and notice what others did to the batch, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(LEASE_S):
                    work.status = await self._renew(work.row["batch_id"], work)
            except (SQLAlchemyError, TimeoutError) as error:
                logger.warning("the lease of %s is not renewed: %s", work.row["batch_id"], error)
            await asyncio.sleep(_LOOK_S)

    async def _renew(self, batch_id: str, work: _Work | None = None) -> str:
        completed, failed = map(len, work.done) if work else (0, 0)
        return await self._calls.run(
            self._batches.renew,
            batch_id,
            self._holder,
            num_completed=completed,
            num_failed=failed,
        )

    async def _finish(self, work: _Work) -> None:
        """Show the results, and how the batch ended."""
        batch_id, expired = work.row["batch_id"], False
        # Also what was written just when its writer was cut off.
        work.done = await self._done(work.output_id, work.error_id)
        if work.status == "in_progress":
            expired = await self._expire(work)
            await self._calls.run(
                self._batches.move, batch_id, "finalizing", among=("in_progress", "finalizing")
            )
        sizes = [
            await self._calls.run(self._files.finish, file_id)
            for file_id in (work.output_id, work.error_id)
        ]
        end = "expired" if expired else "completed"
        await self._calls.run(
            self._batches.move,
            batch_id,
            "cancelled" if work.status == "cancelling" else end,
            output_file_id=work.output_id if sizes[0] else None,
            error_file_id=work.error_id if sizes[1] else None,
            num_completed=len(work.done[0]),
            num_failed=len(work.done[1]),
        )

    async def _expire(self, work: _Work) -> bool:
        """Note of each line without a result that its time was over; return whether any was."""
        number, found = -1, False
        if sum(map(len, work.done)) >= work.row["num_total"]:
            return False
        async for line in self._lines(work.row):
            number += 1
            if not line.strip() or any(number in done for done in work.done):
                continue
            found = True
            error = {
                "code": "batch_expired",
                "message": "The completion window was over before this request was answered.",
            }
            asked, _ = await asyncio.to_thread(_read, line)
            result = _result(asked["custom_id"], error=json.dumps(error).encode())
            await self._write(work, number, result, failed=True)
        return found


async def _some_done(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait for one of `running`, or a moment; return the others, and raise what one raised."""
    done, left = await asyncio.wait(running, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return left


def _result(custom_id: str, *, response: bytes = b"null", error: bytes = b"null") -> bytes:
    """Return a line's result, of which `response` and `error` are JSON."""
    names = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id}
    head = json.dumps(names, ensure_ascii=False)[:-1].encode()
    return head + b', "response": ' + response + b', "error": ' + error + b"}\n"


def _read(line: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a line's object, and its body as JSON; on a thread, as it may be megabytes."""
    asked = json.loads(line)
    return asked, json.dumps(asked["body"]).encode()


def _refused(error: ApiError, endpoint: WireFormat) -> Response:
    body = json.dumps(endpoint.error(error)).encode()
    return Response(body, error.status, {"x-should-retry": "false"}, "application/json")
