"""The contract of everything through which the executor reaches an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from models.engines.base import Chunk, EngineStats, GenerationRequest


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
    """Return consecutive chunks as one."""
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        finish_reason=chunks[-1].finish_reason if chunks else None,
        weights=chunks[-1].weights if chunks else None,
        prompt_tokens=chunks[-1].prompt_tokens if chunks else None,
        cached_tokens=chunks[-1].cached_tokens if chunks else None,
        tool_calls=chunks[-1].tool_calls if chunks else (),
    )
