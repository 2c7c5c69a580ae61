"""A cascade token by token beside one answer by answer, on the default pool's test questions.

    python -m tests.bench.speculative [--every N] [--plot FILE]

Of two stages, a chunk and the base, each way gives what the chunk is unsure of to the base: whole
answers by the confidence of an answer, or tokens by the probability of the likeliest one. The
chunk is the one of the question's domain, or one for all questions. Whole answers are those of the
pool's `outcomes.jsonl`; token by token the base's engine answers, with the chunks as its leads.
Costs are what was read and written: FLOPs (2 per parameter and token) and US dollars at the pool's
prices. Intervals of accuracy are 1.96 standard errors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from models.engines.base import Chunk, Engine, GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.pool import DEFAULT_POOL, Pool, load_pool
from models.tasks.base import check
from models.tokenizer import load_tokenizer
from policies.outcomes import Outcome, read_outcomes
from tests.bench.harness import environment

BASE, ONE = "base", "code"
GATES = (0.0, 0.5, 0.7, 0.9, 0.97, 1.0)
THRESHOLDS = (0.0, 0.5, 0.7, 0.9, 0.95, 0.97, 0.99, 1.1)
MOST_TOKENS = 32
AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An answer: whether it is right, what each stage read and wrote, and what was deferred."""

    right: float
    chunk: tuple[int, int]
    base: tuple[int, int] = (0, 0)
    num_deferred: int = 0
    of: int = 1


def chunk_of(row: Outcome, one: bool) -> str:
    """Return who comes first."""
    return ONE if one else row.tags[0]


def by_answer(rows: Sequence[Outcome], threshold: float, one: bool) -> Iterator[Cost]:
    """Yield the answers of a cascade that judges whole ones by their mean log-probability."""
    for row in rows:
        name, prompt = chunk_of(row, one), row.prompt_tokens or 0
        chunk = (prompt, row.output_tokens[name])
        if math.exp(row.logprobs[name].mean) >= threshold:
            yield Cost(right=row.scores[name], chunk=chunk)
        else:
            base = (prompt, row.output_tokens[BASE])
            yield Cost(right=row.scores[BASE], chunk=chunk, base=base, num_deferred=1)


class ByToken:
    """Asks the base's engine, led by chunks."""

    def __init__(self, engine: Engine, pool: Pool) -> None:
        self._engine, self._pool = engine, pool
        self._tokenizer = load_tokenizer(pool.model(BASE))
        self._places = asyncio.Semaphore(AT_ONCE)

    async def ask(self, rows: Sequence[Outcome], gate: float, one: bool) -> list[Cost]:
        """Return the answers to all `rows`."""
        return await asyncio.gather(*(self._answer(row, gate, one) for row in rows))

    async def _answer(self, row: Outcome, gate: float, one: bool) -> Cost:
        model = self._pool.model(BASE)
        prompt = self._tokenizer.encode_chat(model.opened([{"role": "user", "content": row.query}]))
        request = GenerationRequest(
            request_id=row.id,
            prompt_tokens=prompt,
            members=(chunk_of(row, one), BASE),
            weights=(0.0, 1.0),
            rule="gated",
            gate=gate,
            sampling=SamplingOptions(temperature=0, max_tokens=MOST_TOKENS),
        )
        async with self._places:
            chunks: list[Chunk] = [chunk async for chunk in self._engine.generate(request)]
        num_tokens = sum(len(chunk.tokens) for chunk in chunks)
        followed = chunks[-1].followed
        assert followed is not None, "a chunk leads"
        text = "".join(chunk.text for chunk in chunks)
        return Cost(
            right=float(check(text, row.answer or "")),
            chunk=(len(prompt), num_tokens),
            base=followed,
            num_deferred=followed[1],
            of=num_tokens,
        )


def summed(pool: Pool, costs: Sequence[Cost]) -> dict[str, float]:
    """Return means over answers; `flops` relative to those of the base alone."""
    number = len(costs)
    right = sum(cost.right for cost in costs) / number
    facts = pool.facts()
    chunk, base = facts[ONE], facts[BASE]  # chunks are alike in size and price

    def mean(per: tuple[float, float], stage: str) -> float:
        return (
            sum(a * b for cost in costs for a, b in zip(per, getattr(cost, stage), strict=True))
            / number
        )

    usd = [
        mean((one.rates.usd_per_input_token, one.rates.usd_per_output_token), stage)
        for one, stage in ((chunk, "chunk"), (base, "base"))
    ]
    flops = [
        2 * (one.parameters or 0) * mean((1, 1), stage)
        for one, stage in ((chunk, "chunk"), (base, "base"))
    ]
    return {
        "right": round(100 * right, 1),
        "within": round(196 * math.sqrt(right * (1 - right) / number), 1),
        "deferred": round(100 * sum(c.num_deferred for c in costs) / sum(c.of for c in costs), 1),
        "mflops": round(sum(flops) / 1e6, 1),
        "base_mflops": round(flops[1] / 1e6, 1),
        "usd_per_million": round(1e6 * sum(usd), 2),
    }


async def measured(pool: Pool, rows: Sequence[Outcome]) -> list[dict[str, object]]:
    """Return a row for each way, chunk and threshold."""
    leads = [model.name for model in pool.models_of("chunks")]
    spec = pool.engine_of(BASE).model_copy(update={"leads": tuple(leads)})
    engine = create_engine(spec, [*pool.models_of(spec.name), *map(pool.model, leads)])
    found: list[dict[str, object]] = []

    def note(way: str, one: bool, at: float, costs: Sequence[Cost]) -> None:
        chunk = ONE if one else "its domain's"
        found.append({"way": way, "chunk": chunk, "at": at, **summed(pool, costs)})
        print(json.dumps(found[-1]), flush=True)

    await engine.start()
    try:
        for one in (False, True):
            for threshold in THRESHOLDS:
                note("by answer", one, threshold, list(by_answer(rows, threshold, one)))
            asker = ByToken(engine, pool)
            for gate in GATES:
                note("by token", one, gate, await asker.ask(rows, gate, one))
    finally:
        await engine.stop()
    return found


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Draw accuracy against FLOPs, a panel for each way to choose the chunk."""
    chunks = list(dict.fromkeys(str(row["chunk"]) for row in rows))
    figure, panels = plt.subplots(1, len(chunks), figsize=(9, 3.6), layout="constrained")
    for panel, chunk in zip(panels, chunks, strict=True):
        for way, marker in (("by answer", "o-"), ("by token", "s-")):
            of = [row for row in rows if (row["way"], row["chunk"]) == (way, chunk)]
            panel.plot([r["mflops"] for r in of], [r["right"] for r in of], marker, label=way)
        panel.set(title=f"first: {chunk} chunk", xlabel="MFLOPs per answer", ylabel="right, %")
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.speculative")
    parser.add_argument("--every", type=int, default=4, help="ask one test question in so many")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    pool = load_pool(DEFAULT_POOL)
    told = read_outcomes(DEFAULT_POOL / "outcomes.jsonl")
    rows = [row for row in told if row.split == "test"][:: arguments.every]
    print(json.dumps(environment()), len(rows), file=sys.stderr)
    found = asyncio.run(measured(pool, rows))
    if arguments.plot is not None:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
