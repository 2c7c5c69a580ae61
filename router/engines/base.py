"""The contract of everything through which the executor reaches an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Protocol

from models.engines.base import Chunk, EngineStats, GenerationRequest
from models.tools import join_calls


class EngineClient(Protocol):
    """One engine of the pool, wherever it runs.

    Both ways to generate raise `RequestError`, `ContextOverflow`, `EngineOverloaded` and
    `EngineFailed` as engines do; cancelling the caller, or closing the stream, cancels the request
    at the engine within one step.
    """

    async def complete(self, request: GenerationRequest) -> Chunk:
        """Return the whole answer as one chunk."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is generated."""
        ...

    async def settle(self, request_id: str) -> int:
        """Return how many tokens a cancelled request generated, once it is over.

        Raises `EngineFailed` if the engine that ran it cannot be asked.
        """
        ...

    async def metrics(self) -> list[tuple[str, str]]:
        """Return each replica's name and its library's own metrics, in Prometheus' text format.

        Raises `EngineFailed` if the engine cannot be asked.
        """
        ...

    async def stats(self) -> EngineStats:
        """Return a snapshot; raises `EngineFailed` if the engine cannot serve."""
        ...


def merge(chunks: Sequence[Chunk]) -> Chunk:
    """Return consecutive chunks as one; what the last one says of the whole answer stays."""
    if len(chunks) < 2:
        return chunks[0] if chunks else Chunk(text="", tokens=())
    return replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        reasoning="".join(chunk.reasoning for chunk in chunks),
        refusal="".join(chunk.refusal for chunk in chunks),
        tool_calls=join_calls(call for chunk in chunks for call in chunk.tool_calls),
    )
