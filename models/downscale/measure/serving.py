"""Answers as they are served: by the engine that the pool names, from the checkpoints it ships.

Prompts go through the checkpoint's own chat template, decoding is greedy, and fusion is the
engine's; so what is measured is what a client would have got.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from models.card import read_card
from models.engines.base import Chunk, Engine, Evidence, GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.spec import EngineSpec, Model, ModelSpec
from models.tokenizer import CheckpointTokenizer
from policies.outcomes import AnswerLogprobs
from policies.plan import Answer

ENGINE_KIND: Final = "stacked"
_NUM_AT_ONCE: Final = 64


@dataclass(frozen=True, kw_only=True)
class Written:
    """A greedy answer: its text, and what its tokens' probabilities tell of it."""

    text: str
    logprobs: AnswerLogprobs
    num_prompt_tokens: int


def ask(
    checkpoints: Mapping[str, Path],
    asked: Sequence[tuple[str, Answer]],
    *,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Written]:
    """Answer each query of `asked` by its plan, in order.

    `checkpoints` are the members' folders by name; they share tokenizer and shape. `progress` is
    told of every answer.

    Raises:
        PoolError: the engine does not take a checkpoint.
    """
    spec = EngineSpec(
        name="measured", kind=ENGINE_KIND, dtype="float32", max_queued_requests=_NUM_AT_ONCE
    )
    models = [
        Model(
            spec=ModelSpec(name=name, engine=spec.name, checkpoint=str(folder)),
            card=read_card(folder),
            tokenizer=folder,
        )
        for name, folder in checkpoints.items()
    ]
    tokenizer = CheckpointTokenizer(next(iter(checkpoints.values())))
    requests = [
        _request(
            f"question-{number}",
            tokenizer.encode_chat([{"role": "user", "content": query}]),
            plan,
            max_new_tokens,
        )
        for number, (query, plan) in enumerate(asked)
    ]
    return asyncio.run(_ask(create_engine(spec, models), requests, progress))


async def _ask(
    engine: Engine, requests: Sequence[GenerationRequest], progress: Callable[[int], None]
) -> list[Written]:
    slots = asyncio.Semaphore(_NUM_AT_ONCE)

    async def one(request: GenerationRequest) -> Written:
        async with slots, aclosing(engine.generate(request)) as stream:  # type: ignore[type-var]
            chunks = [chunk async for chunk in stream]
        progress(1)
        return _written(request, chunks)

    await engine.start()
    try:
        return await asyncio.gather(*map(one, requests))
    finally:
        await engine.stop()


def _request(
    request_id: str, prompt_tokens: tuple[int, ...], plan: Answer, max_new_tokens: int
) -> GenerationRequest:
    evidence = None
    if plan.weighting in ("perplexity", "evidence"):
        evidence = Evidence(
            temperature=plan.temperature or 1.0,
            per_token=plan.weighting == "perplexity",
            update=plan.update,
        )
    return GenerationRequest(
        request_id=request_id,
        prompt_tokens=prompt_tokens,
        members=plan.members,
        weights=None if plan.weighting == "perplexity" else plan.weights,
        rule=plan.rule,
        gate=plan.gate,
        contrast=plan.contrast,
        evidence=evidence,
        sampling=SamplingOptions(temperature=0.0, max_tokens=max_new_tokens),
    )


def _written(request: GenerationRequest, chunks: Sequence[Chunk]) -> Written:
    tokens = [token for chunk in chunks for token in chunk.tokens]
    logprobs = [token.logprob or 0.0 for token in tokens]
    entropies = [token.entropy or 0.0 for token in tokens]
    return Written(
        text="".join(chunk.text for chunk in chunks),
        logprobs=AnswerLogprobs(
            mean=round(sum(logprobs) / len(logprobs), 3),
            min=round(min(logprobs), 3),
            num_tokens=len(logprobs),
            entropy=round(max(sum(entropies) / len(entropies), 0.0), 3),
        ),
        num_prompt_tokens=len(request.prompt_tokens),
    )
