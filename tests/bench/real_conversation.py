"""A conversation of ten turns with SmolLM2 on the `stacked` engine, with and without kept prefixes.

    python -m tests.bench.real_conversation

Both engines are asked in turn, each turn of both before the next: the user's 40 random tokens after
all that was said before, 24 tokens of answer. Prints the milliseconds to the first token, kept and
computed, and how many of the prompt's tokens were found, turn by turn.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from models.downscale.dequantize import dequantize
from models.engines.base import Engine
from models.sources.locate import locate
from tests.bench.harness import Row, print_row
from tests.bench.real import SOURCE
from tests.bench.real_contenders import greedy, start_engine

TURNS, USER_TOKENS, ANSWER_TOKENS = 10, 40, 24


async def _ask(engine: Engine, prompt: list[int]) -> tuple[float, int, list[int]]:
    """Return the seconds to the first token, how many of the prompt's were found, the answer."""
    started_s, first_s, found = time.perf_counter(), 0.0, 0
    tokens: list[int] = []
    async for chunk in engine.generate(greedy(prompt, ANSWER_TOKENS)):
        first_s = first_s or time.perf_counter() - started_s
        tokens += [token.token_id for token in chunk.tokens]
        found = chunk.cached_tokens or found
    return first_s, found, tokens


def rows(folder: Path, dtype: str) -> Iterator[Row]:
    """Ask every turn of both engines; the ratio of the times to the first token."""
    rng = random.Random(0)
    with ExitStack() as stack:
        engines = [
            start_engine("stacked", [folder], stack, dtype, {"prefix_cache": keeps})
            for keeps in (False, True)
        ]
        said: list[int] = []
        for turn in range(TURNS):
            said += [rng.randrange(100, 49_000) for _ in range(USER_TOKENS)]
            told = []
            for runner, engine in engines:
                told.append(runner.run(_ask(engine, said)))
            (plain_s, _, plain), (kept_s, found, kept) = told
            yield {
                "name": f"turn {turn + 1}: {len(said)} tokens, {found} found, first token",
                "unit": "times as long",
                "ours": round(1e3 * kept_s),
                "other": round(1e3 * plain_s),
                "measured": round(kept_s / plain_s, 2),
                "same_tokens": plain == kept,
            }
            said += plain


def main() -> None:
    """Command line; see the module's docstring."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = dequantize(locate(SOURCE, folder=Path()).path, Path(temporary))
        for row in rows(folder, "float32"):
            print_row(row)


if __name__ == "__main__":
    main()
