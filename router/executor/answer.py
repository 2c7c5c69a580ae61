"""`Answer`: one request to one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from models.engines.base import Chunk, Evidence, GenerationRequest
from models.errors import ContextOverflow, EngineOverloaded, RequestError
from policies.plan import Answer
from router.energy.chunk import energy_of
from router.executor.task import Task
from router.executor.trace import Run

if TYPE_CHECKING:
    from router.executor.executor import Executor


async def run_answer(
    executor: Executor, answer: Answer, task: Task, run: Run
) -> AsyncGenerator[Chunk, None]:
    """Yield the answer of `answer`'s members, fused if there are several."""
    request = await _request(executor, answer, task, run)
    client = executor.engines[executor.catalog.engine_of(answer)]
    run.engine = executor.catalog.engine_of(answer)
    run.request_id = request.request_id
    run.prompt_tokens = len(request.prompt_tokens)
    try:
        if not task.stream:
            chunk = await client.complete(request)
            _note(run, chunk)
            yield chunk
            return
        async with aclosing(client.stream(request)) as chunks:
            async for chunk in chunks:
                _note(run, chunk)
                yield chunk
    except (EngineOverloaded, RequestError):
        run.prompt_tokens = 0  # the engine refused it unread: nobody pays for that
        raise


def _note(run: Run, chunk: Chunk) -> None:
    run.output_tokens += len(chunk.tokens)
    run.weights, run.energy = chunk.weights, energy_of(chunk)
    if chunk.prompt_tokens is not None:
        run.prompt_tokens = chunk.prompt_tokens


async def _request(executor: Executor, answer: Answer, task: Task, run: Run) -> GenerationRequest:
    if task.prompt.tools is not None:
        executor.catalog.check_tools(answer)
    tokens = await task.prompt.tokens(executor.catalog.tokenizer_of(answer))
    context_tokens = executor.catalog.context_tokens(answer)
    max_tokens = task.max_tokens or executor.limits.default_max_tokens
    messages = task.prompt.messages
    if context_tokens is not None:
        room = context_tokens - len(tokens)
        if room < (task.max_tokens or 1):
            raise ContextOverflow(
                f"The context length of {answer.members[0]!r} is {context_tokens} tokens, but the "
                f"prompt has {len(tokens)} and the answer may take {task.max_tokens or 1}.",
            )
        max_tokens = min(max_tokens, room)
    return GenerationRequest(
        request_id=f"{task.request_id}:{run.path}",
        prompt_tokens=tokens,
        members=answer.members,
        # PackLLM has no prior.
        weights=None if answer.weighting == "perplexity" else answer.weights,
        rule=answer.rule,
        gate=answer.gate,
        contrast=answer.contrast,
        evidence=_evidence(answer),
        sampling=replace(task.sampling, max_tokens=max_tokens),
        client_id=task.client_id,
        messages=None if messages is None else tuple(messages),
        text=task.prompt.plain_text,
        tools=task.prompt.tools,
        timeout_s=None if task.deadline_s is None else max(0.0, task.deadline_s - _now_s()),
    )


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _evidence(answer: Answer) -> Evidence | None:
    """Return how the engine finds the weights; None where the plan has them."""
    if answer.weighting not in ("perplexity", "evidence"):
        return None
    return Evidence(
        temperature=answer.temperature or 1.0,
        per_token=answer.weighting == "perplexity",
        update=answer.update,
    )
