"""Serves one request for an answer: deadline, dispatch, error mapping and its record.

It knows neither which wire format the request came in (a `WireFormat` does) nor where the engines
run (their clients do).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from models.engines.base import Chunk
from models.errors import without_quotes
from models.fair import CLIENT, FairThreads
from policies.experiments.shadow import ShadowMeter
from router.access.authentication import Authenticator, credentials
from router.access.budgets import Budgets
from router.accounts import Accounts, Watcher
from router.bodies import Bodies, Held, address_of
from router.catalog.catalog import Catalog
from router.config import ServingLimits
from router.conversations import Conversations
from router.decide import decide
from router.editions import Editions
from router.engines import EngineClient, merge
from router.errors import ApiError, bad_request, to_api_error
from router.exchange import Exchange, Terms, shoal_field
from router.executor.executor import Executor
from router.experiments.experiments import Experiments
from router.experiments.shadows import Mirror
from router.ledger.writer import Ledger
from router.logs import REQUEST_ID
from router.metrics.page import Metrics
from router.openai_api.endpoint import Ask, Head, ResponseWriter, WireFormat
from router.openai_api.stored import ResponseStore
from router.record import CLIENT_CLOSED_REQUEST
from router.streams import (
    COMMENT,
    DONE,
    ClientDisconnected,
    EventStream,
    before,
    begun,
    ended,
    event,
    in_json,
    side_by_side,
    until_disconnected,
    with_comments,
)
from router.workers import Worker

logger = logging.getLogger(__name__)

_NUM_THREADS = min(32, (os.cpu_count() or 1) + 4)  # as many as asyncio's own
TIMEOUT_HEADER = "x-shoal-timeout-s"

Answers = AsyncGenerator[tuple[int, Chunk], None]


class Background(Protocol):
    """Something that runs beside the requests, and again where it raises."""

    async def run(self) -> None:
        """Run until cancelled, or until there is nothing to do."""
        ...


class Service:
    """Answers requests with the models of one pool."""

    def __init__(  # noqa: PLR0913 - what it is composed of, named at the one call
        self,
        *,
        editions: Editions,
        engines: Mapping[str, EngineClient],
        ledger: Ledger,
        authenticator: Authenticator,
        budgets: Budgets,
        experiments: Experiments,
        metrics: Metrics,
        responses: ResponseStore,
        echo_request_id: bool = True,
        keep_text: bool = False,
        user_secret: bytes = b"",
        shadows: Sequence[ShadowMeter] = (),
        watchers: Sequence[Watcher] = (),
        background: Sequence[Background] = (),
    ) -> None:
        """Serve with `engines`, given by name; `echo_request_id` False leaves that header out.

        Ray Serve adds it to every response itself. With `keep_text` records hold the last user
        message and the answer; users are hashed with the `user_secret`. The `watchers` are told of
        every record. `metrics`, and what is in the `background`, run from `start` to `close`.
        """
        self.editions = editions
        self.engines = engines
        self.experiments = experiments
        self.ledger = ledger
        self.authenticator = authenticator
        self.budgets = budgets
        self.metrics = metrics
        self.responses = responses
        self.accounts = Accounts(
            engines, budgets, ledger, watchers, keep_text=keep_text, user_secret=user_secret
        )
        self.bodies = Bodies(
            max_bytes=self.limits.max_body_bytes,
            max_values=self.limits.max_body_values,
            timeout_s=self.limits.body_timeout_s,
            max_arriving_bytes=self.limits.max_arriving_bytes,
        )
        self._echo_request_id = echo_request_id
        self.mirror = Mirror(shadows, executor=self._executor, ledger=ledger)
        self.num_waited_for = 0
        self._conversations = Conversations(ledger.database, user_secret)
        self._background = {
            Worker(type(one).__name__.lower()): one
            for one in (*background, metrics, experiments, responses, editions)
        }
        self._running: list[asyncio.Task[None]] = []
        metrics.workers = self.workers

    @property
    def catalog(self) -> Catalog:
        """What there is to ask for."""
        return self.editions.current.catalog

    @property
    def limits(self) -> ServingLimits:
        """The bounds of new requests."""
        return self.editions.current.args.limits

    @property
    def workers(self) -> tuple[Worker, ...]:
        """What runs beside the requests."""
        return (self.ledger.worker, self.budgets.worker, *self._background)

    def run_beside(self, one: Background) -> None:
        """Have `one` run beside the requests, too; to be called before the start."""
        self._background[Worker(type(one).__name__.lower())] = one

    async def start(self) -> None:
        """Start what runs beside the requests, and have the loop's threads take clients in turn."""
        asyncio.get_running_loop().set_default_executor(FairThreads(_NUM_THREADS, "shoal"))
        self._running = [
            asyncio.create_task(worker.run(one.run), name=worker.name)
            for worker, one in self._background.items()
        ]

    async def process(self, request: Request, endpoint: WireFormat) -> Response:
        """Answer `request`, whatever happens; exactly one record is kept of it."""
        exchange = Exchange.begin(
            id_prefix=endpoint.id_prefix,
            endpoint=endpoint.path,
            headers=request.headers,
            address=address_of(request),
        )
        self._bind(exchange)
        CLIENT.set(exchange.address)

        async def answer() -> Response:
            exchange.deadline_s = self._deadline_s(exchange, _timeout_s(request.headers))
            async with asyncio.timeout_at(exchange.deadline_s):
                exchange.key = await self.authenticator.authenticate(credentials(request.headers))
            with self.bodies.hold(request, exchange.key_id) as held:
                async with asyncio.timeout_at(exchange.deadline_s):
                    body = await self.bodies.read(request, held)
                work = self._answer(exchange, endpoint, body, held)
                return await until_disconnected(request.receive, work)

        self.num_waited_for += 1
        return await self._settled(exchange, endpoint, answer())

    async def offline(self, body: bytes, endpoint: WireFormat, key_id: str | None) -> Response:
        """Answer a `body` that nobody waits for, for a key that was checked when it came.

        Raises `KeyRejected` where the key is known no more, and `DatabaseUnavailable`.
        """
        exchange = Exchange.begin(id_prefix=endpoint.id_prefix, endpoint=endpoint.path, headers={})
        self._bind(exchange)
        exchange.offline = True
        CLIENT.set(exchange.client_id)
        if key_id is not None:
            exchange.key = await self.authenticator.known(key_id)
        exchange.deadline_s = self._deadline_s(exchange, None)
        return await self._settled(exchange, endpoint, self._answer(exchange, endpoint, body))

    async def _settled(
        self, exchange: Exchange, endpoint: WireFormat, answer: Awaitable[Response]
    ) -> Response:
        """Return what `answer` returns, or the error that it raises; one record is kept."""
        REQUEST_ID.set(exchange.id)
        try:
            response = await answer
        except ClientDisconnected:
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception as error:
            response = self._refuse(exchange, endpoint, error)
        except BaseException:
            self._finish(exchange)
            raise
        if not isinstance(response, EventStream):
            self._finish(exchange)
        return response

    async def close(self) -> None:
        """Wait for the records of requests that were cut off, then close the recorder."""
        await asyncio.sleep(0)  # the records of the last responses
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self.mirror.close()
        await self.accounts.close()

    async def _answer(
        self, exchange: Exchange, endpoint: WireFormat, body: bytes, held: Held | None = None
    ) -> Response:
        async with asyncio.timeout_at(exchange.deadline_s) as limit:
            ask = await self.bodies.parse(endpoint.parse, body)
            if held is not None:
                held.release()
            ask = await endpoint.recall(ask, exchange.key_id)
            exchange.ask = ask
            exchange.user = ask.user or exchange.user
            exchange.record.session = ask.extension.session or exchange.record.session
            if ask.extension.timeout_s is not None:
                exchange.deadline_s = self._deadline_s(exchange, ask.extension.timeout_s)
                limit.reschedule(exchange.deadline_s)
            await decide(
                exchange.catalog,
                exchange.limits,
                exchange,
                ask,
                self.experiments,
                self._conversations,
            )
            await self.accounts.admit(exchange)
            writer = await endpoint.writer(self._head(exchange, ask), ask)
        assert exchange.deadline_s is not None
        executor = self._executor(exchange)
        answers = before(
            exchange.deadline_s,
            side_by_side(
                [
                    executor.first_of((c.plan, *c.fallback), c.task, c.trace)
                    for c in exchange.choices
                ],
                executor.turns,
            ),
        )
        if not ask.stream:
            return await self._whole(exchange, writer, answers)
        # Read before 200 is sent, so that early errors keep their status.
        first = await begun(answers, exchange.limits.first_comment_s)
        events = self._events(exchange, writer, first, answers)
        await anext(events)
        return EventStream(events, self._headers(exchange))

    async def _whole(
        self, exchange: Exchange, writer: ResponseWriter, answers: Answers
    ) -> Response:
        chunks: list[list[Chunk]] = [[] for _ in exchange.choices]
        async for index, chunk in answers:
            chunks[index].append(chunk)
            _count(exchange, index, chunk)
        await self.accounts.settle(exchange)
        whole = [merge(parts) for parts in chunks]
        content: dict[str, Any] = {}

        def write() -> dict[str, Any]:
            content.update(writer.whole(whole, _usage(exchange)))
            content["shoal"] = shoal_field(exchange, exchange.catalog, whole)
            return content

        tops = 1 + (exchange.choices[0].task.sampling.top_logprobs or 0)
        num_tokens = sum(len(one.tokens) + len(one.prompt or ()) for one in whole)
        num_entries = num_tokens * tops + sum(0 if o.rows is None else o.rows.size for o in whole)
        body = await in_json(write, num_entries)
        if not await writer.keep(content, exchange.key_id):
            body = await in_json(lambda: content, num_entries)
        exchange.record.status = 200
        self._conversations.note(exchange)
        return Response(body, 200, self._headers(exchange), "application/json")

    async def _events(
        self,
        exchange: Exchange,
        writer: ResponseWriter,
        first: asyncio.Future[tuple[int, Chunk]],
        rest: Answers,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the response's events, before them nothing; its record is kept when this ends."""
        num_open = len(exchange.choices)
        started = False
        try:
            yield b""  # a generator that never began would end without a word
            async for got in with_comments(first, rest, exchange.limits.comment_interval_s):
                if got is None:
                    yield COMMENT
                    continue
                index, chunk = got
                data = [] if started else writer.start()
                started = True
                _count(exchange, index, chunk)
                num_open -= chunk.finish_reason is not None
                data += writer.chunk(index, chunk)
                if not num_open:
                    await self.accounts.settle(exchange)
                    data += writer.end(_usage(exchange))
                    data[-1]["shoal"] = shoal_field(exchange, exchange.catalog)
                    await writer.keep(data[-1], exchange.key_id)
                if data:
                    yield _events_of(writer, data)
            exchange.record.status = 200
            self._conversations.note(exchange)
            if not writer.named_events:
                yield DONE
        except Exception as error:
            told = _events_of(writer, writer.failed(self._note(exchange, error)))
            yield told if writer.named_events else told + DONE
        finally:
            try:
                await ended(first, rest)
            finally:
                self._finish(exchange)

    def _head(self, exchange: Exchange, ask: Ask) -> Head:
        return Head(
            id=exchange.id,
            created_s=int(exchange.record.time_s),
            model=ask.model,
            fingerprint=exchange.catalog.fingerprint,
            usage=lambda: _usage(exchange),
        )

    def _bind(self, exchange: Exchange) -> None:
        """Let `exchange` begin with what is in force now."""
        exchange.terms = Terms(catalog=self.catalog, limits=self.limits)
        exchange.record.edition = self.editions.current.number

    def _executor(self, exchange: Exchange) -> Executor:
        catalog = exchange.catalog
        return Executor(
            engines=self.engines,
            members=catalog.members,
            scorers=catalog.policies.scorers,
            limits=exchange.limits,
        )

    def _deadline_s(self, exchange: Exchange, asked_s: float | None) -> float:
        """Return when the request ends, by the event loop's clock, counted from its arrival."""
        timeout_s = min(asked_s or math.inf, exchange.limits.request_timeout_s)
        return asyncio.get_running_loop().time() - exchange.elapsed_s + timeout_s

    def _headers(self, exchange: Exchange) -> dict[str, str]:
        headers = {"openai-processing-ms": str(max(1, round(exchange.elapsed_s * 1000)))}
        if self._echo_request_id:
            headers["x-request-id"] = exchange.record.client_request_id
        if exchange.reservation is not None:
            headers |= exchange.reservation.headers
        return headers

    def _refuse(self, exchange: Exchange, endpoint: WireFormat, error: Exception) -> Response:
        told = self._note(exchange, error)
        body = endpoint.error(told)
        return _json_response(told.status, body, {**self._headers(exchange), **told.headers})

    def _note(self, exchange: Exchange, error: Exception) -> ApiError:
        told = to_api_error(error)
        if told.status >= 500:
            why = without_quotes(repr(error))
            logger.error("%s: %s", exchange.id, why, exc_info=told.status == 500)
        exchange.record.status, exchange.record.error = told.status, told.code
        return told

    def _finish(self, exchange: Exchange) -> None:
        """Keep the record of `exchange`, once, when the tokens of what was cut off are known."""
        if exchange.recorded:
            return
        exchange.recorded = True
        self.num_waited_for -= not exchange.offline
        exchange.ended_s = time.perf_counter()
        self.mirror.after(exchange)
        self.accounts.end(exchange)


def _timeout_s(headers: Mapping[str, str]) -> float | None:
    """Return the time that a header asks for; `ApiError` 400 if it is none."""
    if TIMEOUT_HEADER not in headers:
        return None
    try:
        asked_s = float(headers[TIMEOUT_HEADER])
    except ValueError:
        asked_s = 0.0
    if not asked_s > 0:
        raise bad_request(f"{TIMEOUT_HEADER} is not a positive number", TIMEOUT_HEADER)
    return asked_s


def _count(exchange: Exchange, index: int, chunk: Chunk) -> None:
    """Count what `chunk` of choice `index` adds; what another server counted is believed."""
    record, choice = exchange.record, exchange.choices[index]
    before = choice.num_tokens
    choice.num_tokens += len(chunk.tokens)
    if chunk.output_tokens is not None:
        choice.num_tokens = chunk.output_tokens
    record.output_tokens += choice.num_tokens - before
    if chunk.reasoning_tokens is not None:
        record.reasoning_tokens = (record.reasoning_tokens or 0) + chunk.reasoning_tokens
    if chunk.cached_tokens is not None:
        record.cached_tokens = (record.cached_tokens or 0) + chunk.cached_tokens
    if index == 0:
        exchange.answer.append(chunk.text)
    if record.ttft_s is None and chunk.text:
        record.ttft_s = exchange.elapsed_s


def _events_of(writer: ResponseWriter, data: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(event(one, named=writer.named_events) for one in data)


def _usage(exchange: Exchange) -> dict[str, Any]:
    record, prompt_tokens = exchange.record, exchange.prompt_tokens
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": record.output_tokens,
        "total_tokens": prompt_tokens + record.output_tokens,
    }
    if record.cached_tokens is not None:
        # Every choice reads the prompt, which counts once.
        cached = min(record.cached_tokens, prompt_tokens)
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    if record.reasoning_tokens is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": record.reasoning_tokens}
    return usage


def _json_response(status: int, content: object, headers: Mapping[str, str]) -> Response:
    body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return Response(body, status, headers, "application/json")
