"""2,000 simulated users through the API: a learned router against a cascade, end to end.

    python -m tests.bench.experiments_users --out build/users

Trains a router on the pool's outcomes, serves pool and experiment with `shoal serve` (on Ray;
`--local` without), lets users ask held-out questions of the pool's task domains and send the right
answer as a label four times out of five, then prints `shoal experiment report`, checks that
`GET /v1/experiments/NAME` says the same, and leaves the plot and the report in `--out`. Energy is
measured where it can be (NVML, RAPL, else seconds of vCPUs): joules per token by member stand
beside LLMCarbon's in `energy.txt`; `make bench-gpu` runs this on a GPU. The last line is JSON.
Needs models/pools/default.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from models.pool import DEFAULT_POOL, load_pool
from models.tasks import DOMAINS
from models.tasks.base import Split
from policies.encoders.base import parse_encoder
from policies.outcomes import read_outcomes
from policies.routing.fit import FitSettings, fit_router
from policies.routing.router import save_router
from tests.server import started

NAME = "learned-vs-cascade"
_SHOAL = (str(Path(sys.executable).with_name("shoal")),)


def main() -> None:
    """Run the whole show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local", action="store_true", help="one process, without Ray")
    parser.add_argument("--device", default="cpu", help="what answers, by the hardware table")
    parser.add_argument("--router", type=Path, help="a trained router instead of a new one")
    parser.add_argument("--out", type=Path, default=Path("build/users"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "shoal.db").unlink(missing_ok=True)
    router = options.router or train(options.out / "learned.npz")
    config = write_config(options.out, router, options.device)
    arguments = ("--config", str(config.resolve()), *["--local"] * options.local)
    with started(options.out, *arguments) as server:
        began_s = time.monotonic()
        asked = asyncio.run(simulate(server.url, options))
        took_s = time.monotonic() - began_s
        told = settled_report(server.url, asked)
        common = ["experiment", "report", NAME, "--config", str(config)]
        plot = options.out / "report.png"
        shown = run(*common, "--plot", str(plot))
        (options.out / "report.txt").write_text(shown)
        same = json.loads(run(*common, "--json")) == told
        energy = run(
            *("report", "--unit", "joules", "--by", "members,method", "--config", str(config))
        ) + run("calibrate", "energy", "--seconds", "2", "--config", str(config))
        (options.out / "energy.txt").write_text(energy)
    print(shown, energy)
    [quality] = told["primary"]
    print(
        json.dumps(
            {
                "users": options.users,
                "requests": asked,
                "seconds": round(took_s, 1),
                "verdict": told["verdict"],
                "winner": told["winner"],
                "quality_difference": quality["estimate"],
                "interval": [quality["low"], quality["high"]],
                "p": quality["p"],
                "api_equals_command": same,
                "served_on": "one process" if options.local else "Ray",
                "seed": options.seed,
            }
        )
    )


def train(file: Path) -> Path:
    """Train a router on the pool's own outcomes."""
    rows = read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="router")
    save_router(fit_router(rows, encoder=parse_encoder("ngrams", {}), settings=FitSettings()), file)
    return file


def write_config(folder: Path, router: Path, device: str) -> Path:
    """Write the server's configuration: two policies, the experiment, and what `device` answers."""
    chunks = [
        model.name for model in load_pool(DEFAULT_POOL).models if len(model.spec.domains) == 1
    ]
    # As FrugalGPT's chains: three stages, the last of them the largest model.
    chain = {"stages": [chunks[0], chunks[-1], "base"], "thresholds": [0.95, 0.95]}
    config = {
        "ledger": {"url": f"sqlite:///{folder.resolve() / 'shoal.db'}"},
        "carbon": {
            "meter": "always",
            "idle": "busy_time",
            "hardware": {"device": device, "count": os.cpu_count() if device == "cpu" else 1},
        },
        "policies": {
            "learned": {"kind": "learned", "path": str(router.resolve()), "members": chunks},
            "chain": {"kind": "fixed", "plan": {"cascade": chain}},
        },
        "experiments": {
            NAME: {
                "unit": "user",
                "arms": {
                    "chain": {"policy": "chain", "weight": 0.5},
                    "learned": {"policy": "learned", "weight": 0.5},
                },
                "primary": {"metric": "quality", "minimum_effect": 0.05},
                "secondary": ["usd", "latency_s", "escalation_rate"],
                "guardrails": [{"metric": "error_rate", "limit": 0.02}],
                "covariates": ["prompt_tokens"],
            }
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


async def simulate(url: str, options: argparse.Namespace) -> int:
    """Let every user ask one to three questions in turn; return how many were asked."""
    turn = asyncio.Semaphore(options.concurrency)
    limits = httpx.Limits(max_connections=options.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def user(number: int) -> int:
            rng = random.Random(f"{options.seed}/{number}")
            asked = rng.randint(1, 3)
            async with turn:
                for _ in range(asked):
                    await ask(client, rng, f"user-{number}")
            return asked

        return sum(await asyncio.gather(*map(user, range(options.users))))


async def ask(client: httpx.AsyncClient, rng: random.Random, user: str) -> None:
    """Ask one held-out question, and mostly send the right answer back."""
    task = rng.choice(list(DOMAINS.values())).sample(rng, Split.TEST)
    body: dict[str, Any] = {
        "model": "auto",
        "user": user,
        "messages": [{"role": "user", "content": task.question}],
        "max_tokens": 32,
        "temperature": 0,
    }
    answer = await client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    if rng.random() < 0.8:
        feedback = {"id": answer.json()["id"], "label": task.answer}
        (await client.post("/v1/feedback", json=feedback)).raise_for_status()


def settled_report(url: str, num_requests: int) -> dict[str, Any]:
    """Return the API's report once every request is in the ledger, which writes in batches."""
    deadline_s = time.monotonic() + 60
    while True:
        told: dict[str, Any] = httpx.get(f"{url}/v1/experiments/{NAME}", timeout=60).json()
        if told["num_requests"] == num_requests or time.monotonic() > deadline_s:
            return told
        time.sleep(1)


def run(*arguments: str) -> str:
    """Run a shoal command and return what it prints."""
    return subprocess.run([*_SHOAL, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
