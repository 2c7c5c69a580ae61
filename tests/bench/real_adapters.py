"""Adapters fused against one of them, on the real model of `tests.bench.real`: `make bench-real`.

Milliseconds per token of one greedy answer by `stacked`, in one process, in turn: of the base, of
one adapter, of k adapters fused; of k checkpoints, into which the same adapters are merged, stacked
and fused; and of transformers, k times after one another, as who has no lanes would ask them.
Adapters are of rank 16 on every matrix, their numbers random: what they say costs nothing. The
ceiling is what reading the weights once takes, the base's and those of all adapters that answer.
With `--clock cpu` it is the process's CPU time that counts, on one thread, which other work on the
machine lengthens little.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.adapter import read_adapter
from models.downscale.dequantize import dequantize
from models.engines.registry import create_engine
from models.pool import load_pool
from models.sources.locate import locate
from models.training.lora import LowRank, add_adapter, merge_adapter, save_adapter
from tests.bench.harness import Row, print_row, read_bytes_per_s, save
from tests.bench.real import SOURCE
from tests.bench.real_contenders import greedy

RANK, PROMPT_TOKENS = 16, 16
KV_BYTES = 512 * 2**20
MOST_OF_ONE = 1.5
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}

_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Timed = Callable[[list[int], int], float]
"""Milliseconds per token of an answer to a prompt, after its first."""
Clock = Callable[[], float]


def write_adapters(base: Path, folder: Path, number: int) -> list[Path]:
    """Write random adapters of `base`."""
    written = []
    for seed in range(number):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        add_adapter(model, rank=RANK, alpha=RANK, seed=seed)
        for module in model.modules():
            if isinstance(module, LowRank):
                torch.nn.init.normal_(module.expand, std=1e-3)
        written.append(folder / f"a{seed}")
        save_adapter(model, written[-1], base=str(base))
    return written


def write_merged(base: Path, adapters: list[Path], folder: Path) -> list[Path]:
    """Write checkpoints into which the adapters are merged, bfloat16."""
    written = []
    for adapter in adapters:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merge_adapter(model, read_adapter(adapter, base))
        written.append(folder / f"merged-{adapter.name}")
        model.to(torch.bfloat16).save_pretrained(written[-1])
        AutoTokenizer.from_pretrained(base).save_pretrained(written[-1])
    return written


def stacked(
    models: list[dict[str, str]], dtype: str, clock: Clock, stack: ExitStack
) -> Callable[..., Timed]:
    """Start an engine of `models`; returns what times an answer of some of them, fused."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    engine = {"name": "e", "kind": "stacked", "dtype": dtype, "kv_memory_bytes": KV_BYTES}
    content = {"name": "bench", "engines": [engine], "models": models}
    (folder / "pool.yaml").write_text(yaml.safe_dump(content))
    pool = load_pool(folder)
    runner = stack.enter_context(asyncio.Runner())
    running = create_engine(pool.engines[0], pool.models)
    runner.run(running.start())
    stack.callback(lambda: runner.run(running.stop()))

    async def answer(members: tuple[str, ...], prompt: list[int], num_tokens: int) -> float:
        request = replace(greedy(prompt, num_tokens), members=members)
        first_s = 0.0
        async for chunk in running.generate(request):
            if chunk.tokens and not first_s:
                first_s = clock()
        return 1e3 * (clock() - first_s) / (num_tokens - 1)

    return lambda *members: lambda prompt, n: runner.run(answer(members, prompt, n))


def transformers(model: Path, dtype: str, times: int, clock: Clock) -> Timed:
    """`generate`, so many times after one another."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)

    def run(prompt: list[int], num_tokens: int) -> float:
        started_s = clock()
        loaded.generate(
            torch.tensor([prompt], device=device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return 1e3 * (clock() - started_s) / num_tokens

    return lambda prompt, n: sum(run(prompt, n) for _ in range(times))


def measure(
    base: Path,
    adapters: list[Path],
    merged: list[Path],
    dtype: str,
    *,
    rounds: int,
    num_tokens: int,
    clock: Clock,
) -> list[Row]:
    """Time all ways in turn, `rounds` times after one unmeasured; return the rows."""
    names = tuple(path.name for path in adapters)
    with ExitStack() as stack:
        ways: dict[str, Timed] = {}
        model = {"name": "base", "engine": "e", "checkpoint": str(base)}
        own = [{"name": p.name, "base": "base", "adapter": str(p)} for p in adapters]
        of = stacked([model, *own], dtype, clock, stack)
        ways |= {"base": of("base"), "one adapter": of(names[0])}
        ways |= {f"{k} adapters fused": of(*names[:k]) for k in (2, 4, len(names))}
        copies = [{"name": path.name, "engine": "e", "checkpoint": str(path)} for path in merged]
        if merged:
            ways[f"{len(merged)} merged copies fused"] = stacked(copies, dtype, clock, stack)(
                *(path.name for path in merged)
            )
        if merged and dtype != "int8":
            ways[f"transformers, {len(merged)} after one another"] = transformers(
                merged[0], dtype, len(merged), clock
            )
        figures = _rounds(ways, dtype, rounds, num_tokens)
    gc.collect()
    base_bytes = (base / "model.safetensors").stat().st_size // 4 * _BYTES[dtype]
    own_bytes = (adapters[0] / "adapter_model.safetensors").stat().st_size // 4
    own_bytes *= 4 if dtype == "int8" else _BYTES[dtype]
    rate = read_bytes_per_s(base_bytes)
    sizes = {"base": base_bytes, "one adapter": base_bytes + own_bytes}
    sizes |= {f"{k} adapters fused": base_bytes + k * own_bytes for k in (2, 4, len(names))}
    rows = []
    for name, values in figures.items():
        of_one = [v / one for v, one in zip(values, figures["one adapter"], strict=True)]
        row: Row = {
            "name": f"{dtype}: {name}",
            "unit": "ms/token",
            "measured": round(statistics.median(values), 1),
            "ceiling": round(1e3 * sizes[name] / rate, 1) if name in sizes else None,
            "of_one_adapter": round(statistics.median(of_one), 2),
        }
        if name == f"{len(names)} adapters fused" and dtype == "bfloat16":
            row |= {"target": MOST_OF_ONE, "ok": row["of_one_adapter"] <= MOST_OF_ONE}
        rows.append(row)
    return rows


def _rounds(
    ways: Mapping[str, Timed], dtype: str, rounds: int, num_tokens: int
) -> dict[str, list[float]]:
    rng = random.Random(0)
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            prompt = [rng.randrange(100, 49_000) for _ in range(PROMPT_TOKENS)]
            value = way(prompt, num_tokens)
            print(f"{dtype}, round {number}: {name} {value:.1f} ms", file=sys.stderr, flush=True)
            if number:
                figures[name].append(value)
    return figures


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.real_adapters")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="length of every answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16,int8")
    parser.add_argument("--clock", choices=sorted(_CLOCKS), default="wall")
    parser.add_argument("--copies", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
    file = locate(SOURCE, folder=Path()).path
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = dequantize(file, folder / "base")
        adapters = write_adapters(base, folder, arguments.adapters)
        merged = write_merged(base, adapters, folder) if arguments.copies else []
        for dtype in arguments.dtypes.split(","):
            rows += measure(
                base,
                adapters,
                merged,
                dtype,
                rounds=arguments.rounds,
                num_tokens=arguments.tokens,
                clock=_CLOCKS[arguments.clock],
            )
    for row in rows:
        print_row(row)
    save(rows, "adapters", arguments=vars(arguments))


if __name__ == "__main__":
    main()
