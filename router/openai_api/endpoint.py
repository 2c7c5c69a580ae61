"""The contract of an endpoint: what a request asks for, and one wire format for one kind of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, Field

from models.engines.base import Chunk, SamplingOptions
from policies.kinds import Strict
from router.errors import ApiError
from router.executor.task import Prompt
from router.openapi import ErrorBody


class Extension(Strict):
    """The body's `shoal` object: what OpenAI's API has no field for.

    `policy` or `plan` (JSON, see `policies.plan`) replace what the `model` stands for. `explain`
    adds the policy's predictions and everything that ran to the response. `session` names a
    conversation. `timeout_s` ends the request; the `max_*` bound its estimated cost, and
    `quality_floor` its predicted quality, in [0, 1].
    """

    policy: str | None = None
    plan: Any = None
    explain: bool = False
    session: str | None = Field(None, min_length=1, max_length=256)
    timeout_s: float | None = Field(None, gt=0)
    max_usd: float | None = Field(None, ge=0)
    max_wh: float | None = Field(None, ge=0)
    max_gco2e: float | None = Field(None, ge=0)
    max_latency_s: float | None = Field(None, gt=0)
    quality_floor: float | None = Field(None, ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: `n` choices for each of `prompts`, in the order (prompt, choice).

    `max_tokens` None leaves it to the server. `logprobs` says whether the response shows them;
    how many alternatives is in `sampling.top_logprobs`. With `continuous_usage` every chunk of a
    stream tells the usage so far. `echo` puts the prompt before the answer;
    with `max_tokens` 0 it stands alone. `reasoning` False leaves out what a model thinks first.
    `sent` is the whole body, as a member on another server gets it. With `ceiling`, `max_tokens` is
    no promise: the answer may be shorter where the model's context ends.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingOptions
    n: int = 1
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    echo: bool = False
    reasoning: bool = True
    user: str | None = None
    sent: Mapping[str, Any] | None = None
    ceiling: bool = False
    extension: Extension = field(default_factory=Extension)

    @property
    def num_choices(self) -> int:
        """How many choices the response has."""
        return self.n * len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class Head:
    """What every object of one response carries; `created_s` is Unix time.

    `usage` tells what has been counted so far, as a chat completion does.
    """

    id: str
    created_s: int
    model: str
    fingerprint: str
    usage: Callable[[], Mapping[str, Any]]

    def fields(self, kind: str) -> dict[str, Any]:
        """Return the fields that open an object of this `kind`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def ending(chunk: Chunk) -> dict[str, Any]:
    """Return the fields of a choice that tell why it ended: OpenAI's, and vLLM's for what did."""
    told = {} if chunk.stop is None else {"stop_reason": chunk.stop}
    return {"finish_reason": chunk.finish_reason, **told}


class ResponseWriter(Protocol):
    """Writes one response, whole or as events; those carry their type's name if `named_events`.

    What is not said otherwise: events begin with the first chunk's and end with the last one's,
    errors are OpenAI's, and nothing is kept.
    """

    named_events: bool = False

    def whole(self, choices: list[Chunk], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole response; `usage` is OpenAI's, of a chat completion."""
        ...

    def start(self) -> list[dict[str, Any]]:
        """Return what comes before the first token, when who answers has read the prompt."""
        return []

    def chunk(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Return what `chunk` of choice `index` becomes; may be nothing."""
        ...

    def end(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:  # noqa: ARG002
        """Return what comes after the last chunk; together with the last chunk's not nothing."""
        return []

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """Return what ends a stream that failed."""
        return [error.body()]

    async def keep(self, told: dict[str, Any], key_id: str | None) -> bool:  # noqa: ARG002
        """Keep the answer for `key_id` where that was asked for; `told` is it, or its last event.

        Never raises. Returns False where `told` now says that it could not be kept.
        """
        return True


@dataclass(kw_only=True)
class ChunkWriter(ResponseWriter):
    """Writes a completion, chat or text: its choices, all at once or chunk by chunk.

    Objects are called `kind`, and `chunk_kind` in a stream, where each tells the usage so far if
    that was asked for.
    """

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    ask: Ask
    head: Head

    @abstractmethod
    def choice(self, index: int, choice: Chunk) -> dict[str, Any]:
        """Return what a whole `choice` is told as, but for its index and why it ended."""

    def whole(self, choices: list[Chunk], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole response."""
        told = [
            {"index": index, **self.choice(index, choice), **ending(choice)}
            for index, choice in enumerate(choices)
        ]
        return {**self.head.fields(self.kind), "choices": told, "usage": usage}

    def end(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the chunk that carries the usage, if it was asked for: it has no choices."""
        if not self.ask.include_usage:
            return []
        return [{**self.head.fields(self.chunk_kind), "choices": [], "usage": usage}]

    def piece(
        self,
        index: int,
        told: Mapping[str, Any],
        logprobs: dict[str, Any] | None = None,
        end: Chunk | None = None,
    ) -> dict[str, Any]:
        """Return a chunk of one choice: what it adds, and at its `end` why it ended."""
        why = {"finish_reason": None} if end is None else ending(end)
        choice = {"index": index, **told, "logprobs": logprobs, **why}
        data = {**self.head.fields(self.chunk_kind), "choices": [choice]}
        if self.ask.include_usage:
            data["usage"] = self.head.usage() if self.ask.continuous_usage else None
        return data


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What an endpoint takes, answers, streams, and says of errors, for the OpenAPI document."""

    takes: type[BaseModel]
    answers: type[BaseModel]
    streams: tuple[type[BaseModel], ...] = ()
    errors: type[BaseModel] = ErrorBody


class WireFormat(Protocol):
    """What the service needs of an endpoint: a way to read requests, and a writer of answers."""

    path: str
    id_prefix: str
    shapes: Shapes

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`, 400, that names the field."""
        ...

    async def recall(self, ask: Ask, key_id: str | None) -> Ask:  # noqa: ARG002
        """Return `ask` with what an earlier answer to `key_id` brings along; raises `ApiError`."""
        return ask

    async def writer(self, head: Head, ask: Ask) -> ResponseWriter:
        """Return what writes the answer to `ask`."""
        ...

    def error(self, error: ApiError) -> dict[str, Any]:
        """Return the body of a response that refuses a request: OpenAI's."""
        return error.body()
