"""A day of real traffic to the default pool, in less than a day.

    python -m tests.bench.day --out build/day [--requests 2100] [--minutes 20] [--seed 1]

Serves the default pool with `shoal serve --local` and asks it what it would be asked in a day: 400
users with four keys, some of whom ask far more than others, in the day's rhythm of
`simulate_arrivals`; three quarters are held-out questions of the pool's domains, the rest everyday
ones; most go to `auto`, a few to the other policies, of which those to `cascade` take part in an
experiment; some answers are rated by what is right. The real members answer, and their tokens,
seconds and energy are as measured.

The day passes in `--minutes`. At the end the ledger's times are moved to where each request stands
in the day, so that targets per hour see 24 hours; latencies, busy seconds and energy stay. Idle
energy is told by capacity, which does not depend on the time between requests. Then try
`shoal costs`, `shoal report` and `shoal budget simulate` on `--out`/config.yaml.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import yaml

from models.tasks import DOMAINS
from models.tasks.base import Split, check
from tests.bench.everyday import everyday
from tests.bench.replay.days import DAY_S, simulate_arrivals
from tests.server import started

MIDNIGHT_S = 1_795_910_400.0  # 29 November 2026, UTC
NUM_USERS, NUM_KEYS, AT_ONCE = 400, 4, 12
EVERYDAY_SHARE, RATED_SHARE, STREAMED_SHARE = 0.25, 0.4, 0.5
MODELS = {
    "auto": 0.86,
    "policy/cascade": 0.06,
    "policy/fused": 0.03,
    "policy/best-of": 0.03,
    "policy/thrifty": 0.02,
}
MOST_TOKENS = {"task": 32, "everyday": 40}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One request of the day: when, who asks whom what, and how good an answer is, if rated."""

    time_s: float
    user: int
    model: str
    question: str
    kind: str
    grade: Callable[[str], float] | None
    streamed: bool


def plan_day(num_requests: int, *, seed: int) -> list[Planned]:
    """Return about `num_requests` requests in order of time."""
    rng, draws = random.Random(seed), np.random.default_rng(seed)
    asked = list(everyday())
    activity = [1 / (rank + 1) ** 0.7 for rank in range(NUM_USERS)]
    planned = []
    for time_s in simulate_arrivals(num_requests, rng=draws).tolist():
        grade: Callable[[str], float]
        if rng.random() < EVERYDAY_SHARE:
            request = rng.choice(asked)
            question, kind, grade = request.text, "everyday", request.grade
        else:
            task = rng.choice(list(DOMAINS.values())).sample(rng, Split.TEST)
            question, kind = task.question, "task"
            grade = partial(_right, task.answer)
        planned.append(
            Planned(
                time_s=time_s,
                user=rng.choices(range(NUM_USERS), activity)[0],
                model=rng.choices(list(MODELS), list(MODELS.values()))[0],
                question=question,
                kind=kind,
                grade=grade if rng.random() < RATED_SHARE else None,
                streamed=rng.random() < STREAMED_SHARE,
            )
        )
    return planned


def _right(answer: str, said: str) -> float:
    return float(check(said, answer))


async def ask(client: httpx.AsyncClient, request: Planned, key: str) -> None:
    """Ask one question, read all of the answer, and perhaps rate it."""
    body = {
        "model": request.model,
        "user": f"user-{request.user}",
        "messages": [{"role": "user", "content": request.question}],
        "max_tokens": MOST_TOKENS[request.kind],
        "stream": request.streamed,
    }
    headers = {"authorization": f"Bearer {key}"}
    answer = await client.post("/v1/chat/completions", json=body, headers=headers)
    answer.raise_for_status()
    if request.grade is not None and not request.streamed:
        told = answer.json()
        score = request.grade(told["choices"][0]["message"]["content"])
        feedback = {"id": told["id"], "score": score}
        (await client.post("/v1/feedback", json=feedback, headers=headers)).raise_for_status()


async def play(
    url: str, day: list[Planned], keys: list[str], *, minutes: float
) -> list[tuple[float, float]]:
    """Ask everything in its turn; return each request's Unix time and its time of the day."""
    turn, sent, failed = asyncio.Semaphore(AT_ONCE), [], 0
    async with httpx.AsyncClient(base_url=url, timeout=600) as client, asyncio.TaskGroup() as group:

        async def one(request: Planned) -> None:
            nonlocal failed
            try:
                await ask(client, request, keys[request.user % len(keys)])
            except httpx.HTTPError as error:
                failed += 1
                print(f"{request.model}: {error!r}", flush=True)
            finally:
                turn.release()

        began_s = time.monotonic()
        for number, request in enumerate(day):
            due_s = began_s + request.time_s / DAY_S * minutes * 60
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            await turn.acquire()
            began_s += max(0.0, time.monotonic() - due_s)  # the day waits for members that lag
            sent.append((time.time(), MIDNIGHT_S + request.time_s))
            group.create_task(one(request))
            if number % 100 == 0:
                print(f"{number} of {len(day)}, {failed} failed", flush=True)
    return sent


def move_times(file: Path, sent: list[tuple[float, float]]) -> None:
    """Move the ledger's times to those of the day, between requests in proportion."""
    real_s, day_s = np.array(sent).T
    with closing(sqlite3.connect(file)) as ledger, ledger:
        for table in ("requests", "feedback"):
            rows = ledger.execute(f"SELECT request_id, time_s FROM {table}").fetchall()
            moved = np.interp([time_s for _, time_s in rows], real_s, day_s).tolist()
            ledger.executemany(
                f"UPDATE {table} SET time_s = ? WHERE request_id = ?",
                [(time_s, row[0]) for time_s, row in zip(moved, rows, strict=True)],
            )
        ledger.execute("UPDATE experiments SET started_s = ?", (day_s[0],))


def write_config(folder: Path) -> Path:
    """Write the server's configuration: a machine of 1,200 USD, its energy by the best meter.

    Budgets, a target, an experiment and a shadow are there for the dashboards to show.
    """
    learned = {"kind": "learned", "path": "router.npz"}
    config = {
        "ledger": {"url": f"sqlite:///{folder.resolve() / 'day.db'}"},
        "carbon": {
            "zone": "DE",
            "meter": "always",
            "idle": "capacity",
            "hardware": {"device": "cpu", "count": os.cpu_count()},
        },
        "economics": {
            "device_usd": 1200,
            "utilisation": 0.3,
            "usd_per_kwh": 0.3,
            "other_usd_per_hour": 0.01,
        },
        "budgets": {"server": {"usd_per_day": 1, "tokens_per_hour": 10_000_000}},
        "policies": {
            "large": {"kind": "fixed", "plan": "base"},
            "thrifty": {
                "kind": "budgeted",
                "policy": learned,
                "targets": [{"resource": "gco2e", "amount": 0.1}],
            },
        },
        "experiments": {
            "cascade-vs-base": {
                "unit": "user",
                "arms": {
                    "cascade": {"policy": "cascade", "weight": 0.5},
                    "base": {"policy": "large", "weight": 0.5},
                },
                "secondary": ["usd", "latency_s"],
                "guardrails": [{"metric": "error_rate", "limit": 0.05}],
                "target": {"models": ["policy/cascade"]},
            }
        },
        "shadows": {"rival": {"policy": "large", "share": 0.02, "usd_per_day": 1.0}},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def make_key(name: str, config: Path) -> str:
    """Return a new key."""
    command = (sys.executable, "-m", "router.cli", "keys", "create", "--name", name)
    told = subprocess.run(
        [*command, "--config", str(config)], check=True, capture_output=True, text=True
    )
    return str(re.findall(r"sk-\S+", told.stdout)[0])


def main() -> None:
    """Run the day."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2100)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/day"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "day.db").unlink(missing_ok=True)
    config = write_config(options.out)
    day = plan_day(options.requests, seed=options.seed)
    keys = [make_key(f"team-{number}", config) for number in range(NUM_KEYS)]
    with started(options.out, "--config", str(config.resolve()), "--local") as server:
        sent = asyncio.run(play(server.url, day, keys, minutes=options.minutes))
    move_times(options.out / "day.db", sent)


if __name__ == "__main__":
    main()
