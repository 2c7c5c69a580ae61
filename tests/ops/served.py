"""A real server under traffic, and a real Prometheus that scrapes it."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from models.pool import DEFAULT_POOL, load_pool
from router.ports import free_port
from tests.ops.queries import RULES

NAMES = [model.name for model in load_pool(DEFAULT_POOL).models]
BASE = "base"
PROMETHEUS = shutil.which("prometheus")


def everything() -> dict[str, Any]:
    """Return a configuration that uses everything there is a metric of."""
    learned = {"kind": "learned", "path": "router.npz"}
    targets = [{"resource": name, "amount": 1.0} for name in ("usd", "wh", "gco2e")]
    return {
        "budgets": {"server": {"usd_per_day": 1, "tokens_per_hour": 10_000_000}},
        # Nobody listens there: the feed is stale from the start.
        "carbon": {"feed": {"url": "http://127.0.0.1:9/latest", "zone": "DE"}},
        "economics": {"device_usd": 2000, "utilisation": 0.3, "usd_per_kwh": 0.3},
        "policies": {
            "large": {"kind": "fixed", "plan": BASE},
            "stairs": {
                "kind": "fixed",
                "plan": {"cascade": {"stages": [NAMES[0], BASE], "thresholds": [1.0]}},
            },
            "thrifty": {"kind": "budgeted", "policy": learned, "targets": targets},
        },
        "experiments": {
            "race": {
                "unit": "request",
                "arms": {
                    "control": {"policy": "auto", "weight": 0.5},
                    "large": {"policy": "large", "weight": 0.5},
                },
                "guardrails": [{"metric": "usd", "limit": 100.0}],
            }
        },
        "shadows": {"rival": {"policy": "large", "share": 1.0, "usd_per_day": 1.0}},
    }


def wait(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Wait until `condition` holds; a server that is not there yet counts as no."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.25)
    raise AssertionError(f"waited {timeout_s} s in vain: {what}")


@contextmanager
def process(*command: str, folder: Path) -> Iterator[None]:
    """Run a process, its output in a file, until the end."""
    with (folder / f"{Path(command[0]).name}.log").open("wb") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            yield
        finally:
            running.terminate()
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


@contextmanager
def shoal(folder: Path, configuration: dict[str, Any]) -> Iterator[str]:
    """Serve the default pool in one process, with a ledger in `folder`; yield the address."""
    config = folder / "shoal.yaml"
    ledger = {"url": f"sqlite:///{folder}/shoal.db", "flush_interval_s": 0.1}
    config.write_text(yaml.safe_dump({"ledger": ledger, **configuration}, sort_keys=False))
    port = free_port()
    command = (sys.executable, "-m", "router.cli", "serve", "--local", "--config", str(config))
    url = f"http://127.0.0.1:{port}"
    with process(*command, "--port", str(port), folder=folder):
        wait(
            lambda: httpx.get(f"{url}/health", timeout=60).status_code == 200,
            timeout_s=900,
            what=f"shoal serve; its log is in {folder}",
        )
        yield url


@contextmanager
def traffic(url: str) -> Iterator[None]:
    """Ask in every way there is, a few times a second, and rate the answers, until the end."""
    stop = threading.Event()

    def ask() -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            for turn in itertools.count():
                if stop.is_set():
                    return
                with contextlib.suppress(openai.APIError, httpx.HTTPError):
                    _ask(client, url, turn)
                stop.wait(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(300)


def _ask(client: openai.OpenAI, url: str, turn: int) -> None:
    ways: list[dict[str, Any]] = [
        {"model": "auto"},
        {"model": "auto", "stream": True},
        {"model": "policy/thrifty"},
        {"model": "policy/stairs"},
        {"model": "policy/fused", "stream": True},
        {"model": "policy/best-of"},
        {"model": NAMES[0]},
        {"model": "nobody"},
    ]
    way = ways[turn % len(ways)]
    question = f"What is {turn % 50} + 58?"
    messages: Any = [{"role": "user", "content": question}]
    answer: Any = client.chat.completions.create(messages=messages, max_tokens=8, **way)
    answer_id = next(iter([chunk.id for chunk in answer])) if way.get("stream") else answer.id
    if way["model"] in ("auto", "policy/thrifty"):
        time.sleep(0.3)  # the shadow answers after the client has its own
        label = {"id": answer_id, "label": str(turn % 50 + 58)}
        httpx.post(f"{url}/v1/feedback", json=label, timeout=120)


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query that are numbers."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=120)
        body = answer.json()
        assert body["status"] == "success", (expression, body)
        found: list[dict[str, Any]] = body["data"]["result"]
        return [sample for sample in found if not math.isnan(float(sample["value"][1]))]

    def rules(self) -> list[dict[str, Any]]:
        """Return the rules with their health."""
        body = httpx.get(f"{self.url}/api/v1/rules", timeout=120).json()
        return [rule for group in body["data"]["groups"] for rule in group["rules"]]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Scrape `target` and evaluate the chart's rules, every four seconds."""
    assert PROMETHEUS is not None
    config = {
        "global": {"scrape_interval": "4s", "evaluation_interval": "4s"},
        "rule_files": [str(file) for file in RULES],
        "scrape_configs": [
            {
                "job_name": "shoal",
                "static_configs": [{"targets": [target.removeprefix("http://")]}],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = (
        PROMETHEUS,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    url = f"http://127.0.0.1:{port}"
    with process(*command, folder=folder):
        wait(
            lambda: httpx.get(f"{url}/-/ready", timeout=60).status_code == 200,
            timeout_s=300,
            what=f"prometheus; its log is in {folder}",
        )
        yield Prometheus(url=url)
