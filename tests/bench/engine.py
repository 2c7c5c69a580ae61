"""The stacked engine against transformers, against a base of equal size, and against itself.

Everything goes through the engine's public interface: tokens stream over the event loop. Float32,
greedy, random weights. The ceiling of a rate is the machine's measured read bandwidth, for a
working set of that size, over the bytes of weights that a token must read.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path

from models.engines.base import Engine, GenerationRequest, SamplingOptions
from tests.bench import engine_rivals as rivals
from tests.bench.engine_models import (
    LARGER,
    SHIPPED,
    School,
    build_engine,
    save_model,
    weight_bytes,
)
from tests.bench.harness import Row, paired, read_bytes_per_s, seconds, speedup_row

PROMPT = tuple(range(5, 37))
NUM_CONCURRENT = 16
_ids = count()


def run(quick: bool) -> Iterator[Row]:
    """Measure row by row; `quick` leaves out the larger models and most repetitions."""
    for school in (SHIPPED,) if quick else (SHIPPED, LARGER):
        with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
            yield from _School(school, Path(folder), runner, quick=quick).rows()


class _School:
    def __init__(
        self, school: School, folder: Path, runner: asyncio.Runner, *, quick: bool
    ) -> None:
        self._name = school.name
        self._members = [
            save_model(folder / f"m{i}", school.member, seed=i) for i in range(school.num_members)
        ]
        self._base = save_model(folder / "base", school.base, seed=99)
        self._runner = runner
        small = school is SHIPPED
        self._num_tokens = (64 if small else 24) if quick else (128 if small else 48)
        self._pairs = 3 if quick else 15 if small else 7

    def rows(self) -> Iterator[Row]:
        engines = {
            "all": build_engine(self._members),
            "one": build_engine(self._members[:1]),
            "base": build_engine([self._base]),
        }
        for engine in engines.values():
            self._runner.run(engine.start())
        try:
            yield self._single(engines["one"])
            yield self._fused(engines["all"])
            yield self._against_base(engines["all"], engines["base"])
            yield from self._k_of_n(engines["all"], engines["one"])
            yield from self._concurrent(engines["one"])
        finally:
            for engine in engines.values():
                self._runner.run(engine.stop())

    def _single(self, engine: Engine) -> Row:
        model = rivals.load(self._members[0])
        return self._row(
            "one member, batch 1, against transformers generate",
            self._rate(partial(self._answer, engine, 1)),
            self._rate(lambda: rivals.generate(model, [PROMPT], self._num_tokens)),
            target=3.0,
            folders=self._members[:1],
        )

    def _fused(self, engine: Engine) -> Row:
        models = [rivals.load(folder) for folder in self._members]
        return self._row(
            f"{len(models)} members fused, batch 1, against one after another",
            self._rate(partial(self._answer, engine, len(models))),
            self._rate(lambda: rivals.generate_averaged(models, PROMPT, self._num_tokens)),
            target=6.0,
            folders=self._members,
        )

    def _against_base(self, engine: Engine, base: Engine) -> Row:
        return self._row(
            f"{len(self._members)} members fused against the base, same engine",
            self._rate(partial(self._answer, engine, len(self._members))),
            self._rate(partial(self._answer, base, 1)),
            target=1.2,
            folders=self._members,
            goal=1.6,
            member_bytes=weight_bytes(self._members),
            base_bytes=weight_bytes([self._base]),
        )

    def _k_of_n(self, engine: Engine, alone: Engine) -> Iterator[Row]:
        """Cost per token of k of n members, against an engine that holds one only."""
        for k in range(1, len(self._members) + 1):
            many, one = paired(
                partial(seconds, partial(self._answer, engine, k)),
                partial(seconds, partial(self._answer, alone, 1)),
                pairs=self._pairs,
            )
            cost = statistics.median(many) / statistics.median(one)
            yield {
                "name": f"{self._name}: {k} of {len(self._members)} members, cost of a token",
                "unit": "x an engine of one",
                "measured": round(cost, 2),
                "ours": round(statistics.median(many) / self._num_tokens * 1e3, 3),
                "other": round(statistics.median(one) / self._num_tokens * 1e3, 3),
                "ceiling": float(k),
                **({"target": 1.3, "ok": cost <= 1.3} if k == 1 else {}),
            }

    def _concurrent(self, engine: Engine) -> Iterator[Row]:
        model = rivals.load(self._members[0])
        prompts = [PROMPT] * NUM_CONCURRENT
        others: dict[str, Callable[[], None]] = {
            "batched generate": lambda: rivals.generate(model, prompts, self._num_tokens),
            "continuous batching": lambda: rivals.generate_continuously(
                model, prompts, self._num_tokens
            ),
        }
        for name, other in others.items():
            yield self._row(
                f"{NUM_CONCURRENT} requests at once, against transformers' {name}",
                self._rate(partial(self._answer, engine, 1, NUM_CONCURRENT), NUM_CONCURRENT),
                self._rate(other, NUM_CONCURRENT),
                target=1.5,
            )

    def _row(
        self,
        name: str,
        ours: Callable[[], float],
        other: Callable[[], float],
        *,
        target: float,
        folders: Sequence[Path] = (),
        **details: float,
    ) -> Row:
        ceiling = None
        if folders:
            num_bytes = weight_bytes(folders)
            ceiling = read_bytes_per_s(num_bytes) / num_bytes
        ours_per_s, other_per_s = paired(ours, other, pairs=self._pairs)
        return speedup_row(
            f"{self._name}: {name}",
            ours_per_s,
            other_per_s,
            target=target,
            ceiling_per_s=ceiling,
            **details,
        )

    def _rate(self, work: Callable[[], None], num_answers: int = 1) -> Callable[[], float]:
        """Return what measures the tokens per second of `work`."""
        return lambda: num_answers * self._num_tokens / seconds(work)

    def _answer(self, engine: Engine, num_members: int, num_requests: int = 1) -> None:
        """Stream answers fused from the first members."""

        async def read() -> None:
            request = GenerationRequest(
                request_id=f"bench-{next(_ids)}",
                prompt_tokens=PROMPT,
                members=engine.members[:num_members],
                sampling=SamplingOptions(
                    temperature=0.0, max_tokens=self._num_tokens, ignore_eos=True
                ),
            )
            async for _ in engine.generate(request):
                pass

        async def all_at_once() -> None:
            await asyncio.gather(*(read() for _ in range(num_requests)))

        self._runner.run(all_at_once())
