"""What the `stacked` engine does on a GPU, in minutes: `make bench-gpu`.

    python -m tests.bench.gpu [--minutes 8] [--folder SMOLLM2]

SmolLM2-135M-Instruct in bfloat16 and int8 beside transformers (tokens/s at 1, 8 and 32 at once, the
first token of a prompt of 512, joules per token by the GPU's own counter), then adapters fused
against one, drafts, leads that run alone, a conversation of ten turns with and without kept
prefixes, and the rate at which an adapter trains. Parts come in this order and are left out when
the time is over; all figures of a part are paired, in turn, in this one process. Needs torch and
transformers alone, and the model: from its package, or a folder with its safetensors. Without a GPU
it runs on the CPU, to see that it does.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import torch

from models.downscale.adapt import adapt
from models.downscale.chunks import load_model
from models.downscale.dequantize import dequantize
from models.downscale.recipe import AdaptSettings
from models.sources.locate import locate
from models.training.checkpoint import Progress
from models.training.data import Conversation
from models.training.lora import add_adapter
from router.energy import MeterError, NvmlMeter, visible_device
from tests.bench import real_adapters, real_contenders, real_conversation, real_drafts
from tests.bench.harness import Row, print_row, read_bytes_per_s, save
from tests.bench.real import CONCURRENT, SHORT_PROMPT, SOURCE

DTYPES = {"bfloat16": 2, "int8": 1}  # bytes of a weight
NUM_TOKENS, PROMPT_TOKENS, NUM_ADAPTERS = 128, 512, 8
TRAINED_ROW, TRAINED_STEPS = 256, 40
Part: TypeAlias = Callable[[Path, Path, int], Iterator[Row]]
"""From the model's folder, a folder to write to and a number of rounds to rows."""


def rates(folder: Path, _: Path, rounds: int) -> Iterator[Row]:
    """Answers at once: our types and transformers' bfloat16 in turn, with joules per token."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_weights = (folder / "model.safetensors").stat().st_size // 4
    rng, joules = random.Random(0), _joules()
    with ExitStack() as stack:
        ways = {
            f"stacked {dtype}": real_contenders.engine("stacked", folder, stack, dtype=dtype)
            for dtype in DTYPES
        } | {"transformers bfloat16": real_contenders.transformers(folder, dtype="bfloat16")}
        for number in CONCURRENT:
            told: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for turn in range(rounds + 1):
                for name, answer in ways.items():
                    prompts = _prompts(rng, number, SHORT_PROMPT)
                    before = joules()
                    total_s = answer(prompts, NUM_TOKENS)[1]
                    if turn:
                        tokens = number * NUM_TOKENS
                        told[name].append((tokens / total_s, (joules() - before) / tokens))
            for name, figures in told.items():
                per_s, per_token = zip(*figures, strict=True)
                num_bytes = num_weights * DTYPES[name.split()[1]]
                yield {
                    "name": f"{name}: {number} at once",
                    "unit": "tokens/s",
                    "measured": round(statistics.median(per_s), 1),
                    "ceiling": round(number * read_bytes_per_s(num_bytes, device) / num_bytes, 1),
                    "joules_per_token": round(statistics.median(per_token), 4),
                }
        for name, answer in ways.items():
            asked = [answer(_prompts(rng, 1, PROMPT_TOKENS), 2)[0] for _ in range(rounds + 1)]
            yield {
                "name": f"{name}: first token of a prompt of {PROMPT_TOKENS}",
                "unit": "ms",
                "measured": round(1e3 * statistics.median(asked[1:]), 1),
            }


def adapters(folder: Path, into: Path, rounds: int) -> Iterator[Row]:
    """One adapter, and several fused."""
    written = real_adapters.write_adapters(folder, into, NUM_ADAPTERS)
    for dtype in DTYPES:
        yield from real_adapters.measure(
            folder,
            written,
            [],
            dtype,
            rounds=rounds,
            num_tokens=NUM_TOKENS,
            clock=time.perf_counter,
        )


def drafts(folder: Path, into: Path, rounds: int) -> Iterator[Row]:
    """Drafts of one model and of four fused, and leads that run alone."""
    yield from real_drafts.base_rows(folder, into, "bfloat16", rounds)
    yield from real_drafts.fused_rows(folder, into, "bfloat16", rounds)
    yield from real_drafts.gated_rows(folder, into, "bfloat16", rounds, real_drafts.GATES)


def conversation(folder: Path, _: Path, __: int) -> Iterator[Row]:
    """Ten turns, with and without kept prefixes."""
    yield from real_conversation.rows(folder, "bfloat16")


def training(folder: Path, _: Path, __: int) -> Iterator[Row]:
    """An adapter of rank 16 on random text."""
    rng, model = random.Random(0), load_model(folder)
    add_adapter(model, rank=16, alpha=32, seed=0)
    texts = [
        Conversation(tokens=tokens, is_answer=[True] * TRAINED_ROW)
        for [tokens] in (_prompts(rng, 1, TRAINED_ROW) for _ in range(64))
    ]
    marks: list[tuple[float, int]] = []

    def watch(progress: Progress) -> None:
        marks.append((time.perf_counter(), progress.num_tokens))

    settings = AdaptSettings(general_share=0.0, row_tokens=TRAINED_ROW, optimizer="adamw")
    num_tokens = TRAINED_STEPS * settings.rows_per_step * TRAINED_ROW
    adapt(
        model, texts, texts, general_share=0.0, tokens=num_tokens, settings=settings, seed=0,
        watch=watch,
    )  # fmt: skip
    (from_s, first), (to_s, last) = marks[len(marks) // 4], marks[-1]  # compiled by then
    yield {
        "name": "training an adapter of rank 16",
        "unit": "tokens/s",
        "measured": round((last - first) / (to_s - from_s), 1),
    }


def _prompts(rng: random.Random, number: int, length: int) -> list[list[int]]:
    return [[rng.randrange(100, 49_000) for _ in range(length)] for _ in range(number)]


def _joules() -> Callable[[], float]:
    """The GPU's counter of joules; one that stays at zero where there is none."""
    try:
        meter = NvmlMeter(visible_device())
    except MeterError as error:
        print(f"no joules: {error}", file=sys.stderr)
        return lambda: 0.0
    return lambda: 3600 * meter.read_wh()


PARTS: tuple[Part, ...] = (rates, adapters, drafts, conversation, training)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="SmolLM2 as safetensors; made if not given")
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS])
    arguments = parser.parse_args()
    end_s = time.monotonic() + 60 * arguments.minutes
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        into = Path(temporary)
        folder = arguments.folder or dequantize(locate(SOURCE, folder=Path()).path, into / "base")
        for part in PARTS:
            if arguments.only not in (None, part.__name__):
                continue
            for row in part(folder, into, arguments.rounds):
                print_row(row)
                rows.append(row)
                if time.monotonic() > end_s:
                    print(f"{part.__name__}: cut off after {arguments.minutes:g} minutes")
                    break
            if time.monotonic() > end_s:
                break
    save(rows, "gpu")


if __name__ == "__main__":
    main()
