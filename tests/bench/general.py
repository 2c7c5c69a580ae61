"""What the default pool's `general` makes of the pool's questions, and everybody of everyday ones.

    make pool-general

Asks the models through their engines, as they are served, and adds what they said to the pool's
`outcomes.jsonl`, for `make pool-router` to learn from. Of the pool's own questions `general` gets
one in so many, as it takes its time; the others have no score for it.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from models.engines.base import GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.pool import DEFAULT_POOL, Pool, load_pool
from models.tasks import check
from models.tokenizer import Tokenizer, load_tokenizer
from policies.outcomes import AnswerLogprobs, Outcome, read_outcomes, write_outcomes
from tests.bench.everyday import Everyday, everyday

GENERAL, TAG = "general", "general"
MOST_TOKENS = {"pool": 12, "everyday": 40}
AT_ONCE = 32

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Said:
    """One model's answer."""

    text: str
    num_prompt_tokens: int
    logprobs: AnswerLogprobs


async def ask(pool: Pool, name: str, questions: Sequence[str], most_tokens: int) -> list[Said]:
    """Ask the model called `name` each question greedily, many at once."""
    engine = create_engine(pool.engine_of(name), pool.models_of(pool.engine_of(name).name))
    tokenizer, places = load_tokenizer(pool.model(name)), asyncio.Semaphore(AT_ONCE)
    await engine.start()
    try:
        with tqdm(total=len(questions), desc=name) as bar:

            async def one(index: int, question: str) -> Said:
                async with places:
                    request = _request(name, str(index), question, tokenizer, most_tokens)
                    chunks = [chunk async for chunk in engine.generate(request)]
                bar.update()
                tokens = [token for chunk in chunks for token in chunk.tokens]
                logprobs = [token.logprob for token in tokens if token.logprob is not None]
                entropies = [token.entropy for token in tokens if token.entropy is not None]
                return Said(
                    text="".join(chunk.text for chunk in chunks),
                    num_prompt_tokens=len(request.prompt_tokens),
                    logprobs=AnswerLogprobs(
                        mean=round(sum(logprobs) / len(logprobs), 3),
                        min=round(min(logprobs), 3),
                        num_tokens=len(tokens),
                        entropy=round(sum(entropies) / len(entropies), 3) if entropies else None,
                    ),
                )

            return await asyncio.gather(*(one(i, text) for i, text in enumerate(questions)))
    finally:
        await engine.stop()


def _request(
    name: str, request_id: str, question: str, tokenizer: Tokenizer, most_tokens: int
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_tokens=tokenizer.encode_chat([{"role": "user", "content": question}]),
        members=(name,),
        sampling=SamplingOptions(temperature=0, max_tokens=most_tokens),
    )


def add(outcome: Outcome, name: str, said: Said, score: float) -> Outcome:
    """Return `outcome` with what `name` said, and what it was worth."""
    return replace(
        outcome,
        scores={**outcome.scores, name: score},
        outputs={**outcome.outputs, name: said.text},
        logprobs={**outcome.logprobs, name: said.logprobs},
        output_tokens={**outcome.output_tokens, name: said.logprobs.num_tokens},
    )


def without_general(rows: Iterable[Outcome]) -> list[Outcome]:
    """Return the rows as they were before `general` came."""
    return [
        replace(
            row,
            scores=_without(row.scores),
            outputs=_without(row.outputs),
            logprobs=_without(row.logprobs),
            output_tokens=_without(row.output_tokens),
        )
        for row in rows
        if TAG not in row.tags
    ]


def _without(values: Mapping[str, T]) -> dict[str, T]:
    return {name: value for name, value in values.items() if name != GENERAL}


async def measure(pool: Pool, rows: list[Outcome], one_in: dict[str, int]) -> list[Outcome]:
    """Return the rows of the pool with `general`, and those of everyday requests."""
    counts = dict.fromkeys(one_in, 0)
    chosen = []
    for index, row in enumerate(rows):
        split = row.split or ""
        if counts[split] % one_in[split] == 0:
            chosen.append(index)
        counts[split] += 1
    questions = [rows[index].query for index in chosen]
    said = await ask(pool, GENERAL, questions, MOST_TOKENS["pool"])
    for index, answer in zip(chosen, said, strict=True):
        row = rows[index]
        right = float(check(row.answer or "", answer.text))
        rows[index] = add(row, GENERAL, answer, right)
    requests = list(everyday())
    asked = [_outcome(index, request) for index, request in enumerate(requests)]
    for model in pool.models:
        texts = [request.text for request in requests]
        for index, answer in enumerate(await ask(pool, model.name, texts, MOST_TOKENS["everyday"])):
            grade = requests[index].grade(answer.text)
            asked[index] = add(asked[index], model.name, answer, grade)
            if model.name == pool.models[0].name:
                asked[index] = replace(asked[index], prompt_tokens=answer.num_prompt_tokens)
    return rows + asked


def _outcome(index: int, request: Everyday) -> Outcome:
    return Outcome(
        query=request.text,
        scores={GENERAL: 0.0},
        id=f"everyday-{index}",
        tags=(TAG, request.kind),
        split=str(request.split),
        answer=" or ".join(request.accepted) or None,
    )


def main() -> None:
    """Measure, and write the pool's outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pool", type=Path, default=DEFAULT_POOL)
    parser.add_argument("--one-in-router", type=int, default=16)
    parser.add_argument("--one-in-test", type=int, default=8)
    options = parser.parse_args()
    pool, file = load_pool(options.pool), options.pool / "outcomes.jsonl"
    one_in = {"router": options.one_in_router, "test": options.one_in_test}
    rows = asyncio.run(measure(pool, without_general(read_outcomes(file)), one_in))
    write_outcomes(file, rows)
    for split in one_in:
        for kind in sorted({tag for row in rows for tag in row.tags}):
            scores = [
                row.scores[GENERAL]
                for row in rows
                if row.split == split and kind in row.tags and GENERAL in row.scores
            ]
            if scores:
                print(f"{split:7}{kind:12}{len(scores):6}{sum(scores) / len(scores):8.1%}")


if __name__ == "__main__":
    main()
