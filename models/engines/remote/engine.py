"""The remote engine: asks one OpenAI-compatible server, patiently but not for ever."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import httpx

from models.engines.answer_reader import AnswerReader
from models.engines.base import Chunk, EngineStats, GenerationRequest
from models.engines.kind import EngineKind, EngineTraits, formats_of
from models.engines.remote.answer import EventReader
from models.engines.remote.breaker import Circuits
from models.engines.remote.events import DONE, read_events, read_whole
from models.engines.remote.failures import (
    AttemptFailed,
    from_response,
    from_transport,
)
from models.engines.remote.request import RemoteOptions, RowReader, read_vectors, write_body
from models.engines.requests import Admission, check_request
from models.errors import EngineFailed
from models.spec import EngineSpec, Model

_MAX_ERROR_BYTES = 64 * 1024
_MAX_WHOLE_BYTES = 256 * 2**20  # of an answer in one piece: 2,048 vectors of 4,096 numbers fit
_DRAIN_S = 0.5
_BEFORE_JSON = codecs.BOM_UTF8 + b" \t\r\n"


class RemoteEngine:
    """Members that another server runs; see `models.engines.base.Engine`.

    `upstream` maps this engine's members to the server's names for them. It asks for one stream per
    request, so that a client who leaves also ends the work there.
    """

    def __init__(
        self,
        *,
        name: str,
        upstream: Mapping[str, str],
        options: RemoteOptions,
        traits: EngineTraits,
        max_queued_requests: int,
    ) -> None:
        """Only remember; `start` reads the key and opens the connection pool."""
        self._name = name
        self._upstream = dict(upstream)
        self._options = options
        self._traits = traits
        self._url = options.base_url.rstrip("/")
        self._server = f"the server {urlsplit(self._url).netloc.rpartition('@')[2]}"
        self._circuits = Circuits(
            failures=options.breaker_failures, open_s=options.breaker_open_s, clock=time.monotonic
        )
        self._slots = Admission(options.max_connections, max_queued=max_queued_requests)
        self._generated_tokens = 0
        self._client: httpx.AsyncClient | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The models that the server runs for this pool."""
        return tuple(self._upstream)

    async def start(self) -> None:
        """Read the key. The server may be away: that must not keep a pool from starting."""
        key = self._options.read_key(self._name)
        headers = dict(self._options.headers)
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            # A cookie that one client's answer brought would go with all others' questions.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            timeout=httpx.Timeout(
                self._options.read_timeout_s, connect=self._options.connect_timeout_s, pool=None
            ),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=self._options.max_connections
            ),
        )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the server's answer; see the contract."""
        self.check_health()
        await check_request(request, members=self.members, traits=self._traits)
        started_s = time.monotonic()
        given_s = float("inf") if request.timeout_s is None else request.timeout_s
        path, body = write_body(request, self._upstream[request.members[0]], self._options)
        form = self._traits.answer_format(request.members)
        async with self._slots.taken(request):
            for attempt in range(self._options.max_retries + 1):
                answering, num_tokens = False, 0
                try:
                    reader = self._reader(request, body)
                    sorter = AnswerReader(request, form, None)
                    chunks = self._attempt(self._url + path, body, request, reader)
                    async with aclosing(chunks):
                        async for chunk in chunks:
                            answering = True
                            num_tokens += len(chunk.tokens)
                            self._generated_tokens += len(chunk.tokens)
                            hidden = (chunk.output_tokens or 0) - num_tokens
                            self._generated_tokens += max(0, hidden)
                            yield sorter.read(chunk)
                    return
                except AttemptFailed as failure:
                    wait_s = self._wait_s(failure, attempt)
                    left_s = given_s - (time.monotonic() - started_s)
                    last = attempt == self._options.max_retries
                    if answering or last or not failure.retry or wait_s >= left_s:
                        raise failure.error from None
                await asyncio.sleep(wait_s)

    def stats(self) -> EngineStats:
        """Count what runs and waits here; the server's own load is not known."""
        return EngineStats(
            running_requests=self._slots.num_running,
            queued_requests=self._slots.num_waiting,
            active_lanes=self._slots.num_running,
            generated_tokens_total=self._generated_tokens,
            circuit=self._circuits.state,
        )

    def check_health(self) -> None:
        """Raise `EngineFailed` unless started. A server that is away is no reason to restart this
        engine: `stats` shows the circuit instead.
        """
        if self._client is None:
            raise EngineFailed(f"the engine {self._name} is not running")

    async def stop(self) -> None:
        """Close all connections, which fails what runs; idempotent."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(RuntimeError):  # some requests were still running
                await client.aclose()

    def _reader(
        self, request: GenerationRequest, body: Mapping[str, Any]
    ) -> EventReader | RowReader:
        if request.encoding is not None:
            return RowReader(server=self._server, encoding=request.encoding)
        offered = [tool.get("function", {}).get("name") for tool in body.get("tools", ())]
        return EventReader(
            server=self._server,
            logprobs=self._options.logprobs,
            functions=offered,
            echoed=request if body.get("echo") else None,
        )

    def _wait_s(self, failure: AttemptFailed, attempt: int) -> float:
        if failure.retry_after_s is not None:
            return failure.retry_after_s
        # Jitter: those who failed together should not come back together.
        return self._options.backoff_s * 2.0**attempt * random.uniform(0.75, 1.25)

    async def _attempt(
        self,
        url: str,
        body: dict[str, Any],
        request: GenerationRequest,
        reader: EventReader | RowReader,
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer to one HTTP request; raises `AttemptFailed`."""
        self.check_health()
        client, circuits = request.client_id, self._circuits
        if not circuits.admit(client):
            raise AttemptFailed(
                EngineFailed(
                    f"{self._server} has failed repeatedly and is left alone; "
                    f"next attempt in {circuits.wait_s(client):.0f} s"
                ),
                retry=False,
                broken=False,
            )
        over = False
        try:
            async with aclosing(self._exchange(url, body, request.request_id, reader)) as chunks:
                async for chunk in chunks:
                    if not over:
                        circuits.succeeded(client)
                        over = True
                    yield chunk
        except AttemptFailed as failure:
            if failure.broken:
                circuits.failed(client, unreachable=failure.unreachable)
            else:
                circuits.succeeded(client)
            over = True
            raise
        finally:
            if not over:
                circuits.abandoned(client)

    async def _exchange(
        self, url: str, body: dict[str, Any], request_id: str, reader: EventReader | RowReader
    ) -> AsyncGenerator[Chunk, None]:
        client = self._client
        assert client is not None, "check_health raises before"
        try:
            async with client.stream(
                "POST", url, json=body, headers={"x-request-id": request_id}
            ) as response:
                if not response.is_success:
                    told = await _read_some(response)
                    raise from_response(self._server, response.status_code, response.headers, told)
                parts = response.aiter_bytes()
                whole = isinstance(reader, RowReader)
                async for event in _events_of(parts, whole=whole):
                    if event == DONE:
                        reader.done()
                        await _drain(parts)
                        break
                    chunk = reader.read(event)
                    if chunk is not None:
                        yield chunk
        except httpx.HTTPError as error:
            if self._client is None:
                stopped = EngineFailed(f"the engine {self._name} was stopped")
                raise AttemptFailed(stopped, retry=False, broken=False) from None
            if not reader.ended:
                raise from_transport(self._server, error) from None
        yield reader.last()


async def _events_of(
    parts: AsyncIterator[bytes], *, whole: bool
) -> AsyncIterator[dict[str, Any] | str]:
    """Yield the events of a response: one where it comes `whole`, or the server does not stream.

    The body tells that, by how it begins: servers and what stands before them mislabel either kind.
    """
    begun = b""
    async for part in parts:
        begun = (begun + part).lstrip(_BEFORE_JSON)
        if begun:
            break
    if whole or begun.startswith(b"{"):
        body = bytearray(begun)
        async for part in parts:
            body += part
            if len(body) > _MAX_WHOLE_BYTES:
                break
        if len(body) > _MAX_WHOLE_BYTES:
            body.clear()  # which cannot be read
        told = await asyncio.to_thread(read_vectors if whole else read_whole, body)
        yield told or body.decode(errors="replace")
        return
    async for event in read_events(_joined(begun, parts)):
        yield event


async def _joined(begun: bytes, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield begun
    async for part in parts:
        yield part


async def _drain(parts: AsyncIterator[bytes]) -> None:
    """Read a response to its end, which lets its connection be used again."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in parts:
                pass


async def _read_some(response: httpx.Response) -> bytes:
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) >= _MAX_ERROR_BYTES:
            break
    return body


def _inspect(_spec: EngineSpec, options: RemoteOptions, models: Sequence[Model]) -> EngineTraits:
    return EngineTraits(
        fuses=False,
        logprobs=options.logprobs,
        reads=False,
        tools=True,
        formats=formats_of(models),
        media=True,
        here=False,
        refuses=frozenset() if options.logprobs else frozenset({"echo"}),
        encodes={
            model.name: model.spec.remote.encodes
            for model in models
            if model.spec.remote and model.spec.remote.encodes
        },
    )


def _create(spec: EngineSpec, options: RemoteOptions, models: Sequence[Model]) -> RemoteEngine:
    return RemoteEngine(
        name=spec.name,
        upstream={
            model.name: (model.spec.remote and model.spec.remote.model) or model.name
            for model in models
        },
        options=options,
        traits=_inspect(spec, options, models),
        max_queued_requests=spec.max_queued_requests,
    )


KIND = EngineKind(
    options=RemoteOptions,
    inspect=_inspect,
    create=_create,
    remote=True,
    beside_answers=frozenset(
        {
            *("api_key_env", "api_key_file", "connect_timeout_s", "read_timeout_s"),
            *("max_connections", "max_retries", "backoff_s"),
            *("breaker_failures", "breaker_open_s"),
        }
    ),
)
