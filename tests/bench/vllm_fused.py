"""The fused ensemble inside vLLM against its rivals: `make bench-vllm`.

For 4 and for 8 members, at 1, 8 and 32 concurrent requests, tokens per second of

- ours: one vLLM engine over the folder that `shoal stack` writes;
- averaged: a vLLM engine per member, in lock-step, and their distributions averaged at every token.
  vLLM takes no token from outside, so every token is a request to each engine, which finds the text
  so far in its prefix cache;
- apart: the same engines as if averaging cost nothing: each goes its own way, and only the steps
  count. Nobody can have this, but it is the least that lock-step could ever take;
- base: one vLLM engine over a base with as many parameters as all members together;
- stacked: Shoal's own engine over the same members;

and the time to the first token of a single request. All run in this process with the same threads,
on random weights (speed does not depend on them), float32, greedy. A machine's clock may change
within minutes, so ours runs right after every rival, and ratios are medians over such pairs. The
ceiling is the bandwidth of reading as many bytes as all weights have.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from models.card import read_card
from models.engines.vllm_fused.folder import write_folder
from tests.bench.engine_models import School, Size, save_model, weight_bytes
from tests.bench.harness import Row, print_row, read_bytes_per_s, save
from tests.bench.vllm_contenders import (
    AveragedContender,
    Contender,
    StackedContender,
    VllmContender,
)

# Seconds to the first token and in all: of a rival, and of ours.
Pair = tuple[tuple[float, float], tuple[float, float]]

CONCURRENT = (1, 8, 32)
KV_BYTES = 64 * 2**20
TARGETS = {"averaged": 3.0, "base": 1.0}
MEMBER = Size(
    hidden_size=192,
    num_layers=3,
    feed_forward_size=448,
    num_heads=6,
    num_kv_heads=2,
    head_size=32,
    vocab_size=512,
)
# Each base is as wide and deep as it takes to have its members' parameters.
SCHOOLS = (
    School(
        name="4 x 1.2 M",
        num_members=4,
        member=MEMBER,
        base=Size(
            hidden_size=256,
            num_layers=6,
            feed_forward_size=728,
            num_heads=8,
            num_kv_heads=4,
            head_size=32,
            vocab_size=512,
        ),
    ),
    School(
        name="8 x 1.2 M",
        num_members=8,
        member=MEMBER,
        base=Size(
            hidden_size=384,
            num_layers=6,
            feed_forward_size=984,
            num_heads=12,
            num_kv_heads=4,
            head_size=32,
            vocab_size=512,
        ),
    ),
)


def measure(
    school: School, folder: Path, *, num_tokens: int, rounds: int, compiled: bool
) -> list[Row]:
    """Save the school's models under `folder`, run every contender in turn, return rows."""
    members = [
        save_model(folder / f"m{i}", school.member, seed=i) for i in range(school.num_members)
    ]
    base = save_model(folder / "base", school.base, seed=99)
    write_folder({member.name: read_card(member) for member in members}, folder / "fused")
    settings: dict[str, Any] = {
        "num_tokens": num_tokens,
        "dtype": "float32",
        "compiled": compiled,
        "max_requests": max(CONCURRENT),
        "kv_bytes": KV_BYTES,
    }
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        # Small blocks, so that as much as possible is found again; no prompt here fills one twice.
        apart = VllmContender(
            members, **settings, enable_prefix_caching=True, block_size=32, max_logprobs=-1
        )
        contenders: dict[str, Contender] = {
            "ours": VllmContender([folder / "fused"], **settings),
            "averaged": AveragedContender(apart, num_tokens),
            "apart": apart,
            "base": VllmContender([base], **settings),
            "stacked": StackedContender(
                members, num_tokens, runner, device="cpu", dtype="float32", kv_bytes=KV_BYTES
            ),
        }
        for contender in contenders.values():
            stack.callback(contender.stop)
        num_bytes = weight_bytes(members)
        ceiling_per_s = read_bytes_per_s(num_bytes) / num_bytes
        return [
            row
            for num_requests in CONCURRENT
            for row in _compare(
                school,
                contenders,
                num_requests,
                num_tokens=num_tokens,
                rounds=rounds,
                details={
                    "steps_ceiling_per_s": round(ceiling_per_s, 1),
                    "member_bytes": num_bytes,
                    "base_bytes": weight_bytes([base]),
                },
            )
        ]


def _compare(
    school: School,
    contenders: dict[str, Contender],
    num_requests: int,
    *,
    num_tokens: int,
    rounds: int,
    details: Row,
) -> list[Row]:
    """Run each rival and ours after it, `rounds` times after one unmeasured; a row per figure."""
    pairs: dict[str, list[Pair]] = {name: [] for name in contenders if name != "ours"}
    for number in range(rounds + 1):
        for name, its in pairs.items():
            pair = contenders[name](num_requests), contenders["ours"](num_requests)
            if number:
                its.append(pair)
    rows = []
    for place, unit in enumerate(("ms to the first token", "tokens/s")):
        if place == 0 and num_requests > 1:
            continue
        for rival, its in pairs.items():
            ratios = sorted(other[place] / ours[place] for other, ours in its)
            faster = statistics.median(ratios)
            target = TARGETS.get(rival) if place == 1 else None
            medians_s = [statistics.median(pair[side][place] for pair in its) for side in (0, 1)]
            other, ours = (
                num_requests * num_tokens / seconds if place == 1 else 1e3 * seconds
                for seconds in medians_s
            )
            rows.append(
                {
                    "name": f"{school.name}: fused in vLLM against {rival}, {num_requests} at once",
                    "unit": unit,
                    "ours": round(ours, 1),
                    "other": round(other, 1),
                    "measured": round(faster, 2),
                    "lowest": round(ratios[0], 2),
                    "highest": round(ratios[-1], 2),
                    "target": target,
                    "rounds": rounds,
                    **details,
                    **({} if target is None else {"ok": faster >= target}),
                }
            )
            print_row(rows[-1])
    return rows


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vllm_fused")
    parser.add_argument("--members", type=int, choices=[4, 8], help="only this school")
    parser.add_argument("--tokens", type=int, default=48, help="length of every answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every side")
    parser.add_argument("--compiled", action="store_true", help="vLLM compiles (all of its sides)")
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for school in SCHOOLS:
        if arguments.members in (None, school.num_members):
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(
                    school,
                    Path(folder),
                    num_tokens=arguments.tokens,
                    rounds=arguments.rounds,
                    compiled=arguments.compiled,
                )
    save(rows, "vllm-compiled" if arguments.compiled else "vllm", arguments=vars(arguments))


if __name__ == "__main__":
    main()
