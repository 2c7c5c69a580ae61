"""The contract of an endpoint: one wire format for one kind of request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from models.engines.base import Chunk
from router.openai_api.ask import Ask
from router.openai_api.fields import SharedFields


@dataclass(frozen=True, kw_only=True)
class Head:
    """What every object of one response carries; `created_s` is Unix time."""

    id: str
    created_s: int
    model: str
    fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        """Return the fields that open an object of this `kind`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Endpoint(Protocol):
    """Reads a body and writes a response, whole or in chunks; knows nothing of how it is run."""

    path: str
    id_prefix: str
    schema: type[SharedFields]

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`, 400, that names the field."""
        ...

    def response(self, head: Head, ask: Ask, choices: list[Chunk]) -> dict[str, Any]:
        """Return the whole response but for usage."""
        ...

    def stream_start(self, head: Head, ask: Ask) -> Iterator[dict[str, Any]]:
        """Yield what comes before the first token."""
        ...

    def stream_chunk(
        self, head: Head, ask: Ask, index: int, chunk: Chunk, offset: int
    ) -> Iterator[dict[str, Any]]:
        """Yield what `chunk` of choice `index` becomes; the last one says why it ended.

        `offset` is the length of the text of the choice's tokens before this chunk.
        """
        ...

    def stream_end(self, head: Head) -> dict[str, Any]:
        """Return the chunk that carries the usage: no choices."""
        ...


@dataclass(kw_only=True)
class Writer:
    """Writes one response: an endpoint, the request it answers, and how far it got."""

    endpoint: Endpoint
    ask: Ask
    head: Head
    _offsets: Counter[int] = field(default_factory=Counter, init=False)

    def whole(self, choices: list[Chunk], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole response."""
        return {**self.endpoint.response(self.head, self.ask, choices), "usage": usage}

    def start(self) -> list[dict[str, Any]]:
        """Return what comes before the first token."""
        return [self._with_usage(data) for data in self.endpoint.stream_start(self.head, self.ask)]

    def chunk(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Return what `chunk` of choice `index` becomes; may be nothing."""
        offset = self._offsets[index]
        self._offsets[index] += sum(len(token.text) for token in chunk.tokens)
        pieces = self.endpoint.stream_chunk(self.head, self.ask, index, chunk, offset)
        return [self._with_usage(data) for data in pieces]

    def end(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the chunk that carries the usage, if it was asked for."""
        return [self.endpoint.stream_end(self.head) | {"usage": usage}] * self.ask.include_usage

    def _with_usage(self, data: dict[str, Any]) -> dict[str, Any]:
        return data | {"usage": None} if self.ask.include_usage else data
