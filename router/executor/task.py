"""What a plan is run on: one choice of one request."""

from __future__ import annotations

from dataclasses import dataclass

from models.engines.base import Chunk, SamplingOptions
from policies.base import Query
from router.executor.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class Task:
    """One choice to generate.

    `request_id` is unique per choice. `max_tokens` None means as many as the context and the
    serving limits allow. With `stream`, chunks come as they are generated; without, an engine is
    called once per answer, which is cheaper. At `deadline_s`, by the event loop's clock, nobody
    waits for the answer any more (None: not known).
    """

    request_id: str
    query: Query
    prompt: Prompt
    sampling: SamplingOptions
    max_tokens: int | None
    stream: bool
    client_id: str = ""
    deadline_s: float | None = None


def merge(chunks: list[Chunk]) -> Chunk:
    """Return consecutive chunks as one."""
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        finish_reason=chunks[-1].finish_reason if chunks else None,
        weights=chunks[-1].weights if chunks else None,
        prompt_tokens=chunks[-1].prompt_tokens if chunks else None,
        tool_calls=chunks[-1].tool_calls if chunks else (),
    )
