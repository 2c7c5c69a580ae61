"""Asks models for answers, over the API that clients use: of a server, or of a pool started here.

So what is learned from is what a client would have got. Any OpenAI-compatible server will do; what
only Shoal tells (costs, energy, entropies) is missing from the others' answers. What models make
of prompts before they answer, no API tells: `read_prompts` asks the engines of a pool.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Container, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Final

import httpx

from models.engines.base import SamplingOptions
from models.engines.registry import answering_options
from models.engines.remote.answer import read_count
from models.errors import EngineError, RequestError
from models.pool import load_pool, pool_file
from models.spec import EngineSpec, Model
from policies.base import Query
from policies.cascade.base import Reading, Readings
from policies.files import files_below
from policies.grading.base import Ungradable
from policies.json_text import UNREADABLE
from policies.outcomes import AnswerLogprobs
from policies.plan import Answer
from router.access.authentication import AuthConfig
from router.catalog.catalog import load_catalog
from router.compose import open_ledger
from router.config import AppArgs
from router.executor.judging import reading
from router.executor.task import Prompt, Task, request_of
from router.ingress import create_api
from router.ledger.database import LedgerConfig
from router.local import local_service
from router.service import Service

_NUM_TRIES: Final = 6
_FIRST_PAUSE_S: Final = 0.25
_TIMEOUT_S: Final = 600.0
_JUDGED_TOKENS: Final = 12
_LONGEST_PAUSE_S: Final = 60.0
_BUSY: Final = (408, 429, 502, 503, 504)
_UNFIT: Final = (400, 422)
# What only some servers take; asked for again without it where a server refuses.
_EXTRAS: Final = {"logprobs": True, "shoal": {"explain": True}}


# What a model's and an engine's settings may say otherwise while answers and prices stay.
_BESIDE_ANSWERS: Final = {
    *("name", "engine", "otherwise", "domains", "description"),
    *("kv_memory_bytes", "max_queued_requests", "leads", "deployment"),
}


class AskError(Exception):
    """A model that gave no answer: says which and why."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer, and what is known of it; None where the server does not say."""

    text: str
    latency_s: float
    logprobs: AnswerLogprobs | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    usd: float | None = None
    wh: float | None = None


class Asker:
    """Asks the models behind `client`, at most `num_at_once` at a time.

    `url` says where they are, and `states` what each is now, where that is known: answers of two
    places, or of a model before it was trained again, are never mistaken for each other.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        *,
        url: str,
        num_at_once: int,
        states: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.url = url
        self._states = states
        self._client = client
        self._slots = asyncio.Semaphore(num_at_once)
        self._plain: set[tuple[str, ...]] = set()

    def place(self, model: str) -> tuple[str, str]:
        """Return what tells `model` from another of its name."""
        return self.url, self._states.get(model, "")

    async def names(self) -> tuple[str, ...]:
        """Return what can be asked, models and policies; raises `AskError`."""
        try:
            response = await self._client.get("/models")
            response.raise_for_status()
            return tuple(str(model["id"]) for model in response.json()["data"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise AskError(f"{self.url} lists no models: {error}") from None

    async def ask(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        choice: Sequence[str] = (),
    ) -> Reply:
        """Return `model`'s answer; waits and asks again where the server is busy.

        Of a `choice` between words, to which a server that can is held, only the text is asked for;
        else log-probabilities and the like, which cost time. Raises `AskError`.
        """
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        body |= {"seed": seed} if seed is not None else {}
        body |= {"tools": list(tools)} if tools else {}
        async with self._slots:
            start_s = time.perf_counter()
            held: Mapping[str, Any] = {"structured_outputs": {"choice": list(choice)}}
            content = await self._post(model, body, held if choice else _EXTRAS)
        return _read(model, content, time.perf_counter() - start_s)

    async def say(self, model: str, prompt: str, words: Sequence[str]) -> str:
        """Return which of `words` is `model`'s answer to `prompt`, for a grader.

        Whatever else it says where it cannot be held to them. Raises `Ungradable`.
        """
        try:
            reply = await self.ask(
                model,
                [{"role": "user", "content": prompt}],
                max_tokens=_JUDGED_TOKENS,
                choice=words,
            )
        except AskError as error:
            raise Ungradable(str(error)) from None
        return reply.text

    async def _post(
        self, model: str, body: dict[str, Any], wanted: Mapping[str, Any]
    ) -> dict[str, Any]:
        pause_s = _FIRST_PAUSE_S
        why = ""
        for attempt in range(_NUM_TRIES):
            if attempt:
                await asyncio.sleep(pause_s)
                pause_s *= 2
            extras = {} if (model, *wanted) in self._plain else wanted
            try:
                response = await self._client.post("/chat/completions", json={**body, **extras})
                if response.status_code in _UNFIT and extras:
                    response = await self._client.post("/chat/completions", json=body)
                    # What it refuses either way (a prompt that is too long) says nothing of them.
                    if response.status_code == 200:
                        self._plain.add((model, *wanted))
            except httpx.TransportError as error:
                why = f"{type(error).__name__} {error}".strip()
                continue
            if response.status_code == 200:
                try:
                    return dict(response.json())
                except ValueError:
                    raise AskError(f"{model}: the answer is not JSON") from None
            why = _message(response)
            if response.status_code not in _BUSY:
                break
            pause_s = max(pause_s, _told_pause_s(response))
        raise AskError(f"{model}: {why}")


@asynccontextmanager
async def ask_server(
    url: str, *, key: str | None = None, num_at_once: int = 16
) -> AsyncIterator[Asker]:
    """Ask the server at `url`, with or without "/v1" at its end; raises `AskError` for no URL."""
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        client = httpx.AsyncClient(base_url=base, headers=headers, timeout=_TIMEOUT_S)
    except httpx.InvalidURL as error:
        raise AskError(f"{url!r} is no server's address: {error}") from None
    async with client:
        yield Asker(client, url=base, num_at_once=num_at_once)


@asynccontextmanager
async def ask_pool(path: Path, *, num_at_once: int = 16) -> AsyncIterator[Asker]:
    """Start the pool at `path` in this process, without a port, and ask it.

    Its ledger is forgotten. Raises `PoolError` or `PolicyError` where the pool cannot be used.
    """
    async with _started(path) as (service, args):
        transport = httpx.ASGITransport(app=create_api(service, args))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://pool/v1", timeout=None
        ) as client:
            pool = load_pool(path)
            states = {
                model.name: _state(model, pool.engine_of(model.name)) for model in pool.models
            }
            place = str(pool_file(path).resolve())
            yield Asker(client, url=place, num_at_once=num_at_once, states=states)


async def read_prompts(
    path: Path, queries: Iterable[str], *, models: Container[str], num_at_once: int = 16
) -> Readings:
    """Return what those of `models` that tell it make of `queries` before they answer.

    They are of the pool at `path`. A query that a model cannot take is missing from its readings.
    Raises `PoolError` or `PolicyError` where the pool cannot be used.
    """
    async with _started(path) as (service, _):
        members = service.catalog.members
        slots = asyncio.Semaphore(num_at_once)

        async def read(name: str, number: int, query: str) -> Reading | None:
            task = Task(
                request_id=f"reading-{number}",
                query=Query(text=query),
                prompt=Prompt(messages=[{"role": "user", "content": query}]),
                sampling=SamplingOptions(temperature=0, prompt_logprobs=0),
                max_tokens=1,
                stream=False,
            )
            answer = Answer(members=(name,))
            async with slots:
                try:
                    asked = await request_of(answer, task, name, members=members, max_tokens=1)
                    engine = service.engines[members.engine_of(name)]
                    return reading(await engine.complete(asked))
                except (EngineError, RequestError):
                    return None

        found: dict[str, dict[str, Reading]] = {}
        distinct = dict.fromkeys(queries)
        for name in filter(models.__contains__, members.readers()):
            told = await asyncio.gather(*(read(name, n, q) for n, q in enumerate(distinct)))
            found[name] = {q: one for q, one in zip(distinct, told, strict=True) if one is not None}
        return found


@asynccontextmanager
async def _started(path: Path) -> AsyncIterator[tuple[Service, AppArgs]]:
    pool = load_pool(path)
    with TemporaryDirectory() as folder:
        args = AppArgs(
            pool=path,
            ledger=LedgerConfig(url=f"sqlite:///{folder}/asked.db"),
            auth=AuthConfig(),
        )
        catalog = load_catalog(pool)
        ledger = open_ledger(args)
        async with local_service(args, pool, catalog, ledger) as service:
            await service.start()
            try:
                yield service, args
            finally:
                await service.close()


def _state(model: Model, engine: EngineSpec) -> str:
    """Return what changes with a model's answers: its settings, its engine's, and its files."""
    spec = model.spec.model_dump(mode="json", exclude=_BESIDE_ANSWERS)
    run_by = engine.model_dump(mode="json", exclude=_BESIDE_ANSWERS)
    run_by["options"] = answering_options(engine)
    files: list[object] = []
    if model.card is not None:
        path = model.card.path
        every = files_below(path) if path.is_dir() else [path]
        seen = [(file, file.stat()) for file in every]
        files = [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in seen]
    adapter = "" if model.adapter is None else model.adapter.sha256
    return json.dumps([spec, run_by, files, adapter])


def _told_pause_s(response: httpx.Response) -> float:
    """Return how long a busy server asks to be left alone; 0 where it doesn't say in seconds."""
    told = response.headers.get("retry-after", "")
    return min(float(told), _LONGEST_PAUSE_S) if told.isdecimal() else 0.0


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"


def _read(model: str, content: Mapping[str, Any], latency_s: float) -> Reply:
    try:
        choice = content["choices"][0]
        message = choice["message"]
        calls = message.get("tool_calls")
        text = message.get("content") or (json.dumps(calls) if calls else "")
        usage = content.get("usage") or {}
        told = content.get("shoal") or {}
        cost = told.get("cost") or {}
        seen = told.get("logprobs")
        return Reply(
            text=text.encode("utf-8", "replace").decode(),  # half a character is no text
            latency_s=latency_s,
            logprobs=AnswerLogprobs(**seen) if seen else _summary(choice.get("logprobs")),
            prompt_tokens=read_count(usage.get("prompt_tokens")),
            output_tokens=read_count(usage.get("completion_tokens")),
            usd=cost.get("usd"),
            wh=cost.get("wh"),
        )
    except UNREADABLE as error:
        raise AskError(f"{model}: the answer has no text: {error!r}") from None


def _summary(logprobs: Mapping[str, Any] | None) -> AnswerLogprobs | None:
    """Return what another server's `logprobs` tell; they lack the end-of-sequence token.

    None where one of them is no number: a mean over the others would flatter the answer.
    """
    known = [token["logprob"] for token in (logprobs or {}).get("content") or ()]
    if not known or not all(map(math.isfinite, known)):
        return None
    return AnswerLogprobs(mean=sum(known) / len(known), min=min(known), num_tokens=len(known))
