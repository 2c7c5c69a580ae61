"""The same tables on any device: `python -m tests.bench.vllm_device [--size large]`.

For a machine with CUDA and torch; vLLM's rows come where vLLM is installed. Prints, for the fused
members and the base of equal parameters, in Shoal's `stacked` engine and in vLLM, tokens per second
at 1, 8 and 32 concurrent requests and the milliseconds to the first token, beside the ceiling: a
decoding step must read every weight once, so no more than bandwidth / bytes steps per second are
possible, with one token for each request. Bandwidth is measured on the device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch

from models.card import read_card
from models.engines.vllm_fused.folder import write_folder
from tests.bench.engine_models import SHIPPED, School, Size, save_model
from tests.bench.harness import Row, environment, read_bytes_per_s
from tests.bench.vllm_contenders import Contender, StackedContender, VllmContender

CONCURRENT = (1, 8, 32)
# A base of 1.0 B parameters and four members of a quarter of that.
LARGE = School(
    name="4 x 0.26 B",
    num_members=4,
    member=Size(
        hidden_size=1024,
        num_layers=16,
        feed_forward_size=3072,
        num_heads=16,
        num_kv_heads=8,
        head_size=64,
        vocab_size=32768,
    ),
    base=Size(
        hidden_size=1792,
        num_layers=24,
        feed_forward_size=5120,
        num_heads=28,
        num_kv_heads=7,
        head_size=64,
        vocab_size=32768,
    ),
)
SCHOOLS = {"shipped": SHIPPED, "large": LARGE}


def run(school: School, folder: Path, *, device: str, num_tokens: int, rounds: int) -> list[Row]:
    """Measure every contender of `school`; print and return a row for each load."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    members = [
        save_model(folder / f"m{i}", school.member, seed=i) for i in range(school.num_members)
    ]
    base = save_model(folder / "base", school.base, seed=99)
    write_folder({member.name: read_card(member) for member in members}, folder / "fused")
    kv_bytes = 2**30 if device == "cuda" else 64 * 2**20
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        contenders: dict[str, tuple[Contender, list[Path]]] = {}
        for name, folders in (("fused", members), ("base", [base])):
            contenders[f"{name}, stacked engine"] = (
                StackedContender(
                    folders, num_tokens, runner, device=device, dtype=dtype, kv_bytes=kv_bytes
                ),
                folders,
            )
        if find_spec("vllm"):
            for name, shown, folders in (
                ("fused", [folder / "fused"], members),
                ("base", [base], [base]),
                ("members apart", members, members),
            ):
                contender = VllmContender(
                    shown,
                    num_tokens,
                    dtype=dtype,
                    compiled=device == "cuda",
                    max_requests=max(CONCURRENT),
                    kv_bytes=kv_bytes,
                )
                contenders[f"{name}, vLLM"] = (contender, folders)
        for contender, _ in contenders.values():
            stack.callback(contender.stop)
        return list(_rows(school, contenders, device, num_tokens=num_tokens, rounds=rounds))


def _rows(
    school: School,
    contenders: dict[str, tuple[Contender, list[Path]]],
    device: str,
    *,
    num_tokens: int,
    rounds: int,
) -> Iterator[Row]:
    element_bytes = 2 if device == "cuda" else 4
    print(f"{school.name} on {device}: tokens/s, share of the ceiling, ms to the first token")
    for num_requests in CONCURRENT:
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for number in range(rounds + 1):  # in turn; the first round is not counted
            for name, (contender, _) in contenders.items():
                figures = contender(num_requests)
                if number:
                    runs[name].append(figures)
        for name, (_, folders) in contenders.items():
            num_bytes = sum(read_card(folder).parameters for folder in folders) * element_bytes
            first_s, last_s = (
                statistics.median(column) for column in zip(*runs[name], strict=True)
            )
            ceiling = num_requests * read_bytes_per_s(num_bytes, device) / num_bytes
            tokens_per_s = num_requests * num_tokens / last_s
            row = {
                "name": f"{school.name}: {name}, {num_requests} at once",
                "tokens_per_s": round(tokens_per_s, 1),
                "ceiling_tokens_per_s": round(ceiling, 1),
                "bytes_per_step": num_bytes,
                "first_token_ms": round(1e3 * first_s, 2),
            }
            print(
                f"{row['name']:<52} {tokens_per_s:>10.1f} {tokens_per_s / ceiling:>7.1%} "
                f"{1e3 * first_s:>9.2f}",
                flush=True,
            )
            yield row


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vllm_device")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=found)
    parser.add_argument("--size", choices=sorted(SCHOOLS), default="shipped")
    parser.add_argument("--tokens", type=int, default=128, help="length of every answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep the record as JSON")
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        rows = run(
            SCHOOLS[arguments.size],
            Path(folder),
            device=arguments.device,
            num_tokens=arguments.tokens,
            rounds=arguments.rounds,
        )
    record = {"environment": environment(), "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
