"""What the frontier bench measures: fused answers, and likelihoods from transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from models.engines.base import Chunk, Evidence, GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.pool import Pool
from models.tasks import check
from models.tokenizer import Tokenizer, load_tokenizer
from policies.evidence import Floats
from policies.footprint import Rates
from policies.outcomes import AnswerLogprobs, Outcome
from policies.plan import Answer

MAX_TOKENS = 32
CONCURRENCY = 64
BATCH = 64


def fused_outcomes(
    pool: Pool,
    outcomes: Sequence[Outcome],
    plans: Mapping[str, Sequence[Answer]],
    rates: Mapping[str, Rates],
) -> list[Outcome]:
    """Return `outcomes` with the greedy answers of `plans`, one per name and query, added."""
    answered = asyncio.run(_fused_outcomes(pool, outcomes, plans))
    result = list(outcomes)
    for (index, name), answer in answered.items():
        plan, read = plans[name][index], outcomes[index].prompt_tokens or 0
        usd = sum(rates[member].footprint(read, len(answer.tokens)).usd for member in plan.members)
        result[index] = _with(result[index], name, answer, usd)
    return result


def likelihoods(
    pool: Pool, members: Sequence[str], outcomes: Sequence[Outcome]
) -> tuple[Floats, Floats]:
    """Return answer_QTM and prompt_QM of the reference answers; see `policies.evidence`."""
    tokenizer = load_tokenizer(pool.model(members[0]))
    answers, prompts = [], []
    for name in members:
        card = pool.model(name).card
        assert card is not None
        model = AutoModelForCausalLM.from_pretrained(card.path, dtype=torch.float32).eval()
        end = model.config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        answer, prompt = _score(model, tokenizer, outcomes, end)
        answers.append(answer)
        prompts.append(prompt)
    return np.stack(answers, axis=-1), np.stack(prompts, axis=-1)


def prompt_tokens(tokenizer: Tokenizer, outcome: Outcome) -> tuple[int, ...]:
    """Return the query through the chat template."""
    return tokenizer.encode_chat([{"role": "user", "content": outcome.query}])


async def _fused_outcomes(
    pool: Pool, outcomes: Sequence[Outcome], plans: Mapping[str, Sequence[Answer]]
) -> dict[tuple[int, str], Chunk]:
    first = next(iter(plans.values()))[0].members[0]
    spec = pool.engine_of(first)
    engine = create_engine(spec, pool.models_of(spec.name))
    tokenizer = load_tokenizer(pool.model(first))
    slots = asyncio.Semaphore(CONCURRENCY)

    async def ask(index: int, name: str) -> Chunk:
        async with slots:
            plan = plans[name][index]
            request = _request(f"{name}-{index}", prompt_tokens(tokenizer, outcomes[index]), plan)
            async with aclosing(engine.generate(request)) as stream:  # type: ignore[type-var]
                chunks = [chunk async for chunk in stream]
            text = "".join(chunk.text for chunk in chunks)
            tokens = tuple(token for chunk in chunks for token in chunk.tokens)
            return Chunk(text=text, tokens=tokens, finish_reason=chunks[-1].finish_reason)

    await engine.start()
    try:
        keys = [(index, name) for index in range(len(outcomes)) for name in plans]
        answered = await asyncio.gather(*(ask(index, name) for index, name in keys))
    finally:
        await engine.stop()
    return dict(zip(keys, answered, strict=True))


def _request(request_id: str, tokens: tuple[int, ...], plan: Answer) -> GenerationRequest:
    evidence = None
    if plan.weighting in ("perplexity", "evidence"):
        evidence = Evidence(
            temperature=plan.temperature or 1.0,
            per_token=plan.weighting == "perplexity",
            update=plan.update,
        )
    return GenerationRequest(
        request_id=request_id,
        prompt_tokens=tokens,
        members=plan.members,
        weights=None if plan.weighting == "perplexity" else plan.weights,
        rule=plan.rule,
        gate=plan.gate,
        contrast=plan.contrast,
        evidence=evidence,
        sampling=SamplingOptions(temperature=0.0, max_tokens=MAX_TOKENS),
    )


def _with(outcome: Outcome, name: str, answer: Chunk, usd: float) -> Outcome:
    assert outcome.answer is not None
    logprobs = [token.logprob or 0.0 for token in answer.tokens]
    entropies = [token.entropy or 0.0 for token in answer.tokens]
    return replace(
        outcome,
        scores={**outcome.scores, name: float(check(outcome.answer, answer.text))},
        outputs={**outcome.outputs, name: answer.text},
        logprobs={
            **outcome.logprobs,
            name: AnswerLogprobs(
                mean=float(np.mean(logprobs)),
                min=min(logprobs),
                num_tokens=len(logprobs),
                entropy=float(np.mean(entropies)),
            ),
        },
        output_tokens={**outcome.output_tokens, name: len(logprobs)},
        costs={**outcome.costs, name: usd},
    )


def _score(
    model: torch.nn.Module, tokenizer: Tokenizer, outcomes: Sequence[Outcome], end: int
) -> tuple[Floats, Floats]:
    """Teacher-force prompt and reference answer: answer [Q, T] (NaN beyond the end), prompt [Q]."""
    rows = []
    for outcome in outcomes:
        assert outcome.answer is not None
        prompt = prompt_tokens(tokenizer, outcome)
        rows.append((prompt, (*tokenizer.encode(outcome.answer), end)))
    width = max(len(answer) for _, answer in rows)
    answers, prompts = np.full((len(rows), width), np.nan), np.zeros(len(rows))
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.tensor([[*p, *a, *[0] * (longest - len(p) - len(a))] for p, a in batch])
        with torch.inference_mode():
            # Padding stands at the end, where causal attention doesn't let it matter.
            logp = model(ids).logits[:, :-1].log_softmax(-1)
        picked = logp.gather(2, ids[:, 1:, None])[..., 0].double().numpy()
        for row, (prompt, answer) in enumerate(batch):
            cut = len(prompt) - 1
            prompts[start + row] = picked[row, :cut].sum()
            answers[start + row, : len(answer)] = picked[row, cut : cut + len(answer)]
    return answers, prompts
