"""A conversation of ten turns with SmolLM2 on the `stacked` engine, with and without kept prefixes.

    python -m tests.bench.real_conversation

Both engines are asked in turn, each turn of both before the next: the user's 40 random tokens after
all that was said before, 24 tokens of answer. Prints the milliseconds to the first token and how
many of the prompt's tokens were found, turn by turn.
"""

from __future__ import annotations

import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from models.downscale.base import dequantize
from models.engines.base import Engine
from models.sources.locate import locate
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


def main() -> None:
    """Command line; see the module's docstring."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = dequantize(locate(SOURCE, folder=Path()).path, Path(temporary))
        engines = [
            start_engine("stacked", [folder], stack, "float32", {"prefix_cache": keeps})
            for keeps in (False, True)
        ]
        said: list[int] = []
        print("turn  prompt  first token, ms: computed  kept  ratio  found", flush=True)
        for turn in range(TURNS):
            said += [rng.randrange(100, 49_000) for _ in range(USER_TOKENS)]
            told = []
            for runner, engine in engines:
                told.append(runner.run(_ask(engine, said)))
            (plain_s, _, plain), (kept_s, found, kept) = told
            assert plain == kept, "the tokens are the same"
            print(
                f"{turn + 1:4}  {len(said):6}  {1e3 * plain_s:25.0f}  {1e3 * kept_s:4.0f}  "
                f"{kept_s / plain_s:5.2f}  {found:5}",
                flush=True,
            )
            said += plain


if __name__ == "__main__":
    main()
