"""A look at the prompt against its text alone: who should answer, and who will be right.

`python -m tests.bench.probing` prints the tables under "A look at the prompt" in
docs/routing/results.md. On the default pool `learned` and `probing` over the same router play the
same questions, of known domains and of whole domains that were left out. On a real model,
SmolLM2-135M (the pool's `general`, its weights in float32 on our own engine), everyday requests of
known and of left-out subjects are told apart into those that it answers well and others: by the
text, by its reading, and by both.

`--pool P --outcomes O` plays the models of another pool, whose outcomes `shoal outcomes collect`
wrote, and asks its engines so how long a look takes.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import numpy as np
import yaml
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from models.downscale.dequantize import dequantize
from models.pool import DEFAULT_POOL, load_pool
from models.sources.locate import locate
from policies.base import Query
from policies.cascade.base import Reading, Readings
from policies.encoders.ngrams import NGrams
from policies.evaluation.metrics import bootstrap
from policies.evaluation.play import Played, play
from policies.footprint import Rates
from policies.outcomes import Outcome, read_outcomes
from policies.plan import Answer, Cascade
from policies.routing.fit import fit_router
from policies.routing.policy import Learned, Trade
from policies.routing.probing import Foresight, Probing
from policies.routing.router import Router, save_router
from policies.tables import text_table
from router.learning.asking import ask_pool, read_prompts
from tests.bench.real import SOURCE
from tests.bench.routing_harness import Protocol, folds

Floats = NDArray[np.float64]

GENERAL = "general"
VALUES = (1e-5, 2e-6)
"""What a right answer is worth in US dollars; the pool's own policy has the first."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("pool", "real"))
    parser.add_argument("--every", type=int, default=1, help="Take one in so many outcomes.")
    parser.add_argument("--pool", type=Path, default=DEFAULT_POOL)
    parser.add_argument("--outcomes", type=Path, default=DEFAULT_POOL / "outcomes.jsonl")
    parser.add_argument("--values", type=float, nargs="*", default=VALUES, help="USD an answer")
    given = parser.parse_args(arguments)
    if given.only != "real":
        rows = read_outcomes(given.outcomes)[:: given.every]
        on_a_pool(given.pool, rows, (None, *given.values))
    if given.only != "pool" and given.pool == DEFAULT_POOL:
        on_a_real_model()


def on_a_pool(path: Path, rows: Sequence[Outcome], values: Sequence[float | None]) -> None:
    """Print what looks gain on a pool's outcomes, how often they are taken, and how long."""
    pool = load_pool(path)
    names = [name for name in pool.facts() if name in rows[0].scores and name != GENERAL]
    rates = {name: facts.rates for name, facts in pool.facts().items()}
    began_s = time.perf_counter()
    readings = asyncio.run(read_prompts(path, [row.query for row in rows], models=set(names)))
    number = sum(map(len, readings.values()))
    print(f"{number:,} readings in {time.perf_counter() - began_s:.0f} s")
    table: list[tuple[str, ...]] = [
        ("questions", "an answer's value", "policy", "quality", "USD/1,000", "looks", "taken over")
    ]
    waits: dict[tuple[bool, bool], list[tuple[float, ...]]] = {}
    protocols: dict[Protocol, str] = {"split": "known domains", "tasks": "domains left out"}
    for protocol, told in protocols.items():
        parts = "folds" if protocol == "split" and not rows[0].split else protocol
        runs: dict[tuple[float | None, str], list[Played]] = {}
        looks: dict[float | None, list[tuple[bool, bool]]] = {}
        for train, test in folds(rows, parts, train="router"):
            router = fit_router(
                [rows[q] for q in train],
                encoder=NGrams(bits=15),
                models=names,
                readings=readings,
            )
            for value in values:
                trade = Trade(answer_value_usd=value)
                plain = Learned(router, models=pool.facts(), trade=trade)
                # Where readings tell no more than the text there is no policy that reads.
                kind = Probing if router.looks else Learned
                seeing = kind(router, models=pool.facts(), trade=trade)
                for name, policy in (("learned", plain), ("probing", seeing)):
                    played = list(play_all(policy, [rows[q] for q in test], rates, readings))
                    runs.setdefault((value, name), []).extend(played)
                looks.setdefault(value, []).extend(
                    looked(seeing, rows[q], one) for q, one in zip(test, played, strict=True)
                )
            if protocol == "split" and router.looks and not waits:
                policy, tests = Probing(router, models=pool.facts()), [rows[q] for q in test]
                waits_s = waiting(path, router, [row.query for row in tests])
                runs_now = play_all(policy, tests, rates, readings)
                for row, one, wait_s in zip(tests, runs_now, waits_s, strict=True):
                    waits.setdefault(looked(policy, row, one), []).append(wait_s)
        for value in values:
            table += compared(told, value, runs[value, "learned"], runs[value, "probing"],
                              looks[value])  # fmt: skip
    print(text_table(table, num_left=3))
    for (read, taken_over), both in waits.items():
        plain_S, seeing_S = np.array(both).T
        print(
            f"{'read' if read else 'not read'}{', then another' if taken_over else ''}: "
            f"{len(both)} first tokens, after {1000 * np.median(plain_S):.0f} ms by text, "
            f"{1000 * np.median(seeing_S):.0f} by a look, "
            f"{np.median(seeing_S / plain_S):.2f} times as long (medians)"
        )


def waiting(path: Path, router: Router, queries: Sequence[str]) -> list[tuple[float, ...]]:
    """Return how long each query's first token took, in seconds, by text alone and by a look.

    One at a time, in turns; each query is asked both ways, of engines that had not read it.
    """
    waits_s = {kind: [0.0] * len(queries) for kind in ("learned", "probing")}
    folder = path if path.is_dir() else path.parent
    content = yaml.safe_load((folder / "pool.yaml" if path.is_dir() else path).read_text())

    async def ask(file: Path, turn: int) -> None:
        async with ask_pool(file) as asker:
            for number, query in enumerate(queries):
                kind = tuple(waits_s)[(number + turn) % 2]
                messages = [{"role": "user", "content": query}]
                reply = await asker.ask(f"policy/{kind}", messages, max_tokens=1)
                waits_s[kind][number] = reply.latency_s

    # In the pool's own folder, since its checkpoints are named from there.
    with NamedTemporaryFile("w", dir=folder, suffix=".yaml") as file:
        learned = Path(file.name).with_suffix(".npz")
        save_router(router, learned)
        own = {kind: {"kind": kind, "path": learned.name} for kind in waits_s}
        yaml.safe_dump(content | {"policies": own | {"auto": own["learned"]}}, file)
        file.flush()
        try:
            for turn in range(2):
                asyncio.run(ask(Path(file.name), turn))
        finally:
            learned.unlink()
    return [*zip(*waits_s.values(), strict=True)]


def play_all(
    policy: Learned, rows: Sequence[Outcome], rates: dict[str, Rates], readings: Readings
) -> Iterator[Played]:
    """Yield what `policy` does with each of `rows`."""
    scorers = {"probing": policy.scorer} if isinstance(policy, Probing) else {}
    for row in rows:
        yield play(policy, row, rates=rates, scorers=scorers, readings=readings)


def looked(policy: Learned, row: Outcome, played: Played) -> tuple[bool, bool]:
    """Return whether the prompt was read first, and whether another than its reader answered."""
    plan = policy.decide(Query(text=row.query, prompt_tokens=row.prompt_tokens or 0)).plan
    return isinstance(plan, Cascade), len(played.used) > 1


def compared(
    told: str,
    value: float | None,
    plain: Sequence[Played],
    seeing: Sequence[Played],
    looks: Sequence[tuple[bool, bool]],
) -> Iterator[tuple[str, ...]]:
    """Yield a row for either policy; the second has its difference and a 95% interval."""
    worth = "quality alone" if value is None else f"{value:g} USD"
    quality_Q, looked_Q = (np.array([one.quality for one in run]) for run in (plain, seeing))
    usd, looked_usd = (1000 * np.mean([one.usd or 0.0 for one in run]) for run in (plain, seeing))
    gain_Q = looked_Q - quality_Q
    low, high = bootstrap(lambda rows: float(gain_Q[rows].mean()), len(gain_Q))
    yield told, worth, "learned", f"{quality_Q.mean():.4f}", f"{usd:.5f}", "", ""
    yield (
        told,
        worth,
        "probing",
        f"{looked_Q.mean():.4f} ({gain_Q.mean():+.4f} [{low:+.4f}, {high:+.4f}])",
        f"{looked_usd:.5f}",
        f"{np.mean([read for read, _ in looks]):.1%}",
        f"{np.mean([over for _, over in looks]):.1%}",
    )


def on_a_real_model() -> None:
    """Print how well SmolLM2's answers are foreseen."""
    rows = [row for row in read_outcomes(DEFAULT_POOL / "everyday.jsonl") if GENERAL in row.scores]
    spec = load_pool(DEFAULT_POOL).model(GENERAL).spec
    with TemporaryDirectory() as at:
        folder = Path(at)
        dequantize(locate(SOURCE, folder=folder).path, folder / "smollm2")
        content = {
            "name": "real",
            "engines": [{"name": "e", "kind": "stacked", "device": "cpu", "dtype": "float32"}],
            "models": [
                {"name": GENERAL, "engine": "e", "checkpoint": "smollm2", "system": spec.system}
            ],
        }
        (folder / "pool.yaml").write_text(yaml.safe_dump(content))
        began_s = time.perf_counter()
        readings = asyncio.run(
            read_prompts(folder / "pool.yaml", [row.query for row in rows], models={GENERAL})
        )
        print(f"{len(readings[GENERAL]):,} readings in {time.perf_counter() - began_s:.0f} s")
        table: list[tuple[str, ...]] = [("requests", "told by", "AUROC")]
        for protocol, told in (("folds", "known subjects"), ("tasks", "subjects left out")):
            table += foreseen(told, rows, readings, protocol)
        print(text_table(table, num_left=2))


def foreseen(
    told: str, rows: Sequence[Outcome], readings: Readings, protocol: Protocol
) -> Iterator[tuple[str, ...]]:
    """Yield how well each way tells the requests that the model answers well, with intervals."""
    scores: dict[str, list[float]] = {}
    right: list[bool] = []
    for train, test in folds(rows, protocol):
        router = fit_router(
            [rows[q] for q in train],
            encoder=NGrams(bits=13),
            models=[GENERAL],
            readings=readings,
        )
        for q in test:
            row, reading = rows[q], readings[GENERAL][rows[q].query]
            right.append(row.scores[GENERAL] > 0.5)
            for name, score in ways(router, row.query, reading).items():
                scores.setdefault(name, []).append(score)
    right_Q = np.array(right)
    for name, values in scores.items():
        score_Q = np.array(values)
        area = roc_auc_score(right_Q, score_Q)

        def of(sample: NDArray[np.intp], score_Q: Floats = score_Q) -> float:
            known = right_Q[sample]
            if known.all() or not known.any():
                return float("nan")
            return float(roc_auc_score(known, score_Q[sample]))

        low, high = bootstrap(of, len(right_Q))
        yield told, name, f"{area:.3f} [{low:.3f}, {high:.3f}]"


def ways(router: Router, query: str, reading: Reading) -> dict[str, float]:
    """Return what each way expects of the answer; only their order counts."""
    stage, foresight = Answer(members=(GENERAL,)), Foresight(router)
    return {
        "the text": foresight.foresee(query, stage, None),
        "its log-probability": reading.logprob_mean,
        "the first token's entropy": -(reading.entropy or 0.0),
        "text and reading": foresight.foresee(query, stage, reading),
    }


if __name__ == "__main__":
    main()
