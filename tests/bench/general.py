"""What the default pool's `general` makes of the pool's questions, and everybody of everyday ones.

    make pool-general

Asks the models through their engines, greedily and with their own opening message, what they were
not asked before, and grades all answers anew. Of the pool's own questions `general` gets one in so
many, as it takes its time, and those that the pool's policy sends to it; what it said goes into the
pool's `outcomes.jsonl`. Everyday requests go to everybody, and what they said into `everyday.jsonl`
beside it: the router learns from it what the chunks are not for. Last, `general` answers some of
the everyday questions that the router is tested on and never learns from, which are others and of
other kinds too. `--again NAME` asks that model everything once more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from models.engines.base import GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.pool import DEFAULT_POOL, Pool, load_pool
from models.spec import Model
from models.tasks.base import check
from models.tokenizer import Tokenizer, load_tokenizer
from policies.base import Policy, Query
from policies.files import write_atomic
from policies.outcomes import AnswerLogprobs, Outcome, read_outcomes, write_outcomes
from policies.plan import members
from policies.registry import build_policy
from tests.bench.everyday import Everyday, everyday, right, subject_words, usable

GENERAL = "general"
MOST_TOKENS = {"pool": 12, "everyday": 24}
AT_ONCE = 8
KEPT_AT_ONCE = 200
EVERYDAY_FILE = "everyday.jsonl"
TESTED = Path(__file__).parents[1] / "policies" / "routing" / "data" / EVERYDAY_FILE
# Of the kinds with the most requests, `general` is asked one in so many.
ONE_IN = {"explain": 4, "how": 3, "meaning": 2, "counting": 2}
ONE_IN_TESTED = 4


@dataclass(frozen=True, kw_only=True)
class Said:
    """One model's answer."""

    text: str
    num_prompt_tokens: int
    logprobs: AnswerLogprobs


async def ask(pool: Pool, name: str, questions: Sequence[str], most_tokens: int) -> list[Said]:
    """Ask the model called `name` each question greedily, many at once."""
    spec = pool.engine_of(name)
    if spec.kind == "llamacpp":  # two threads wait for each other wherever the machine is busy
        spec = spec.model_copy(update={"options": {**spec.options, "num_threads": 1}})
    engine = create_engine(spec, pool.models_of(spec.name))
    tokenizer, places = load_tokenizer(pool.model(name)), asyncio.Semaphore(AT_ONCE)
    await engine.start()
    try:
        with tqdm(total=len(questions), desc=name) as bar:

            async def one(index: int, question: str) -> Said:
                async with places:
                    model = pool.model(name)
                    request = _request(model, str(index), question, tokenizer, most_tokens)
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
    model: Model, request_id: str, question: str, tokenizer: Tokenizer, most_tokens: int
) -> GenerationRequest:
    messages = model.opened([{"role": "user", "content": question}])
    return GenerationRequest(
        request_id=request_id,
        prompt_tokens=tokenizer.encode_chat(messages),
        members=(model.name,),
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


async def ask_own(pool: Pool, rows: list[Outcome], one_in: Mapping[str, int]) -> list[Outcome]:
    """Return the pool's rows with what `general` said: to one in so many of each split, and to all
    that the pool's default policy sends to it."""
    policy = build_policy(pool.policies["auto"], folder=pool.folder, models=pool.facts())
    chosen = [
        index
        for split, step in one_in.items()
        for place, index in enumerate(i for i, row in enumerate(rows) if row.split == split)
        if place % step == 0 or _goes_to_general(policy, rows[index])
    ]
    chosen = [index for index in chosen if GENERAL not in rows[index].outputs]
    said = await ask(pool, GENERAL, [rows[i].query for i in chosen], MOST_TOKENS["pool"])
    rows = list(rows)
    for index, answer in zip(chosen, said, strict=True):
        score = float(check(rows[index].answer or "", answer.text))
        rows[index] = add(rows[index], GENERAL, answer, score)
    return rows


def _goes_to_general(policy: Policy, row: Outcome) -> bool:
    plan = policy.decide(Query(text=row.query, prompt_tokens=row.prompt_tokens or 0)).plan
    return members(plan) == (GENERAL,)


async def ask_everyday(
    pool: Pool, file: Path, asked: Iterable[Outcome], tested: Iterable[str]
) -> list[Outcome]:
    """Return what every model says to everyday requests, but for those that are `tested`.

    What `asked` has of it is not asked again; what is new goes into `file` as it comes.
    """
    known, kept = {text.lower() for text in tested}, {row.query: row for row in asked}
    requests = [request for request in everyday() if request.text.lower() not in known]
    rows = [
        kept.get(request.text) or Outcome(query=request.text, scores={GENERAL: 0.0})
        for request in requests
    ]
    for model in pool.models:
        unasked = [
            index
            for index, (row, request) in enumerate(zip(rows, requests, strict=True))
            if model.name not in row.outputs
            and (model.name != GENERAL or _drawn(request, ONE_IN.get(request.kind, 1)))
        ]
        for first in range(0, len(unasked), KEPT_AT_ONCE):
            part = unasked[first : first + KEPT_AT_ONCE]
            texts = [rows[index].query for index in part]
            said = await ask(pool, model.name, texts, MOST_TOKENS["everyday"])
            for index, answer in zip(part, said, strict=True):
                rows[index] = add(rows[index], model.name, answer, 0.0)
                if model is pool.models[0]:
                    rows[index] = replace(rows[index], prompt_tokens=answer.num_prompt_tokens)
            write_outcomes(file, rows)
    rows = [_graded(index, *pair) for index, pair in enumerate(zip(rows, requests, strict=True))]
    write_outcomes(file, rows)
    return rows


def _drawn(request: Everyday, one_in: int) -> bool:
    """Return whether a request is among those that are asked, the same everywhere."""
    return int.from_bytes(blake2b(request.text.encode(), digest_size=4).digest()) % one_in == 0


def _graded(index: int, row: Outcome, request: Everyday) -> Outcome:
    return replace(
        row,
        scores={name: request.grade(answer) for name, answer in row.outputs.items()},
        id=f"everyday-{index}",
        tags=(request.kind,),
        split=str(request.split),
        answer=" or ".join(request.accepted) or None,
    )


async def ask_tested(pool: Pool, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tested rows, one in so many with `general`'s answer and whether it was usable.

    What is asked in another language, and has no one answer, cannot be judged here.
    """
    chosen = [i for i in range(0, len(rows), ONE_IN_TESTED) if "answer" not in rows[i]]
    texts = [rows[i]["query"] for i in chosen]
    said = await ask(pool, GENERAL, texts, MOST_TOKENS["everyday"])
    rows = list(rows)
    for index, answer in zip(chosen, said, strict=True):
        rows[index] = {**rows[index], "answer": answer.text}
    for row in (row for row in rows if "answer" in row):
        row.pop("usable", None)
        if "accepted" in row:
            row["usable"] = right(row["answer"], row["accepted"])
        elif row["kind"] != "languages":
            row["usable"] = usable(row["answer"], subject_words(row["query"]))
    return rows


def _forget(row: Outcome, names: Container[str]) -> Outcome:
    """Return `row` as if the models called `names` had not been asked."""

    def without(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in names}

    return replace(
        row,
        scores=without(row.scores) or {GENERAL: 0.0},
        outputs=without(row.outputs),
        logprobs=without(row.logprobs),
        output_tokens=without(row.output_tokens),
    )


def main() -> None:
    """Measure, and write the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pool", type=Path, default=DEFAULT_POOL)
    parser.add_argument("--one-in-router", type=int, default=64)
    parser.add_argument("--one-in-test", type=int, default=32)
    parser.add_argument("--again", nargs="+", default=[], help="ask these models once more")
    options = parser.parse_args()
    pool, file = load_pool(options.pool), options.pool / "outcomes.jsonl"
    one_in = {"router": options.one_in_router, "test": options.one_in_test}
    tested = [json.loads(line) for line in TESTED.read_text("utf-8").splitlines()]
    everyday_file = options.pool / EVERYDAY_FILE
    asked = read_outcomes(everyday_file) if everyday_file.exists() else []
    rows = read_outcomes(file)
    asked = [_forget(row, options.again) for row in asked]
    if GENERAL in options.again:
        rows = [_forget(row, [GENERAL]) for row in rows]
        for row in tested:
            row.pop("answer", None)
    texts = [row["query"] for row in tested]
    asked = asyncio.run(ask_everyday(pool, everyday_file, asked, texts))
    rows = asyncio.run(ask_own(pool, rows, one_in))
    write_outcomes(file, rows)
    answered = asyncio.run(ask_tested(pool, tested))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in answered]
    write_atomic(TESTED, "".join(lines))
    rows += asked
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
