"""End to end on real Ray: the default pool, two replicas, users who know the right answers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from models.pool import DEFAULT_POOL, load_pool
from models.tasks import domain
from models.tasks.base import Split
from policies.outcomes import read_outcomes
from tests.server import started

NUM_USERS = 80


@cache
def contrast() -> tuple[str, str, str]:
    """Return a domain, the model made for it, and the one that knows it least, by the outcomes."""
    models = [model for model in load_pool(DEFAULT_POOL).models if len(model.spec.domains) == 1]
    outcomes = read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="router")
    gaps = {}
    for own in models:
        [name] = own.spec.domains
        theirs = [outcome.scores for outcome in outcomes if name in outcome.tags]
        right = {m.name: sum(scores[m.name] for scores in theirs) / len(theirs) for m in models}
        stranger = min(right, key=right.__getitem__)
        gaps[name, own.name, stranger] = right[own.name] - right[stranger]
    return max(gaps, key=gaps.__getitem__)


def write_config(folder: Path) -> Path:
    """Write an experiment of a domain's own model against a stranger to it."""
    _, own, stranger = contrast()
    config = {
        "ledger": {"url": f"sqlite:///{folder / 'shoal.db'}"},
        "ingress": {"min_replicas": 2, "max_replicas": 2},
        "policies": {
            "stranger": {"kind": "fixed", "plan": stranger},
            "own": {"kind": "fixed", "plan": own},
        },
        "experiments": {
            "own-or-not": {
                "arms": {
                    "stranger": {"policy": "stranger", "weight": 0.5},
                    "own": {"policy": "own", "weight": 0.5},
                },
                "primary": {"minimum_effect": 0.4},
            }
        },
    }
    file = folder / "config.yaml"
    # The first arm is the control, so the order matters.
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def ask_twice(url: str, number: int) -> set[str]:
    """Ask two held-out questions as one user, send the right answers, return the arms met."""
    rng = random.Random(number)
    arms = set()
    with httpx.Client(base_url=url, timeout=120) as http:
        for _ in range(2):
            task = domain(contrast()[0]).sample(rng, Split.TEST)
            body: dict[str, Any] = {
                "model": "auto",
                "user": f"user-{number}",
                "messages": [{"role": "user", "content": task.question}],
                "max_tokens": 32,
                "temperature": 0,
            }
            answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
            arms.add(answer["shoal"]["arm"])
            feedback = {"id": answer["id"], "label": task.answer}
            http.post("/v1/feedback", json=feedback).raise_for_status()
    return arms


def settled_report(url: str) -> dict[str, Any]:
    """Return the API's report once the ledger, which writes in batches, has every request."""
    deadline_s = time.monotonic() + 120
    while True:
        told: dict[str, Any] = httpx.get(f"{url}/v1/experiments/own-or-not", timeout=120).json()
        if told["num_requests"] == 2 * NUM_USERS or time.monotonic() > deadline_s:
            return told
        time.sleep(0.5)


@pytest.mark.ray
@pytest.mark.load
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not (DEFAULT_POOL / "pool.yaml").exists(), reason="the default pool has not been built"
)
def test_users_of_two_replicas_find_the_better_policy(tmp_path: Path) -> None:
    """80 users ask and rate through two ingress replicas; the report names the right winner.

    Users are seeded by their number. Everybody stays in one arm whichever replica answers, and
    the command says what the API says.
    """
    config = write_config(tmp_path)
    with started(tmp_path, "--config", str(config)) as server:
        with ThreadPoolExecutor(8) as pool:
            arms = list(pool.map(lambda number: ask_twice(server.url, number), range(NUM_USERS)))
        told = settled_report(server.url)
        report = ("experiment", "report", "own-or-not", "--config", str(config), "--json")
        shown = subprocess.run(
            [sys.executable, "-m", "router.cli", *report],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    assert all(len(found) == 1 for found in arms)
    assert (told["verdict"], told["winner"]) == ("ship", "own"), told["recommendation"]
    assert told["num_requests"] == 2 * NUM_USERS
    assert not told["sample_ratio"]["alarm"]
    assert json.loads(shown) == told
