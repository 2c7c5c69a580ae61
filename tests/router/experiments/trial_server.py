"""A server with a ledger, experiments and scripted models, for the tests of this folder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from models.pool import load_pool
from router.compose import open_ledger
from router.config import load_args
from router.editions import catalog_of
from router.ledger.database import Database
from router.ledger.feedback import Feedback, add_feedback
from router.ledger.writer import Ledger
from router.local import http_server, local_service
from router.record import MemberTokens
from router.service import Service
from tests.router.ledger.records import keep, record


@dataclass
class Trial:
    """A running server: its address, its parts, and the configuration it was started with."""

    http: httpx.Client
    service: Service
    ledger: Ledger
    config: Path
    loop: asyncio.AbstractEventLoop

    def ask(
        self, text: str = "hello", *, model: str = "auto", headers: Any = None, **fields: Any
    ) -> dict[str, Any]:
        """Ask for a chat completion; it must succeed."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        response = self.http.post("/v1/chat/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        data: dict[str, Any] = response.json()
        return data

    def rate(self, response_id: str, **feedback: Any) -> httpx.Response:
        """Send feedback."""
        return self.http.post("/v1/feedback", json={"id": response_id, **feedback})

    def run(self, work: Any) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def stop_watching(self) -> None:
        """From now on experiments are checked only when told, not also in their own time."""

        async def stop() -> None:
            for task in asyncio.all_tasks():
                if task.get_name() == "experiments":
                    task.cancel()

        self.run(stop())

    def flush(self) -> None:
        """Wait until every row is written."""
        self.run(self.ledger.flush())


POOL: dict[str, Any] = {
    "name": "trial-pool",
    "engines": [{"name": "one", "kind": "fake", "options": {}}],
    "models": [
        {"name": "cheap", "engine": "one", "usd_per_million_output_tokens": 1},
        {
            "name": "dear",
            "engine": "one",
            "usd_per_million_output_tokens": 10,
            "domains": ["arithmetic"],
        },
    ],
    "policies": {
        "auto": {"kind": "fixed", "plan": "cheap"},
        "small": {"kind": "fixed", "plan": "cheap"},
        "large": {"kind": "fixed", "plan": "dear"},
    },
}

EXPERIMENT: dict[str, Any] = {
    "arms": {
        "control": {"policy": "small", "weight": 0.5},
        "new": {"policy": "large", "weight": 0.5},
    },
    "secondary": ["usd"],
}


def write_config(folder: Path, *, scripts: dict[str, Any] | None = None, **config: Any) -> Path:
    """Write a pool of two scripted models and a configuration with its own ledger."""
    engines = [{"name": "one", "kind": "fake", "options": {"models": scripts or {}}}]
    (folder / "pool.yaml").write_text(yaml.safe_dump({**POOL, "engines": engines}))
    file = folder / "config.yaml"
    ledger = {"url": f"sqlite:///{folder / 'shoal.db'}", "flush_interval_s": 0.02}
    file.write_text(yaml.safe_dump({"pool": "pool.yaml", "ledger": ledger, **config}))
    return file


@contextmanager
def serving(config: Path) -> Iterator[Trial]:
    """Serve `config` on a free port, in a thread."""
    args = load_args(config)
    pool = load_pool(args.pool)
    ready, started, failed = threading.Event(), [], []

    async def serve() -> None:
        ledger = open_ledger(args)
        async with local_service(args, pool, catalog_of(args, pool), ledger) as service:
            server = http_server(service, host="127.0.0.1", port=0, args=args)
            task = asyncio.create_task(server.serve())
            while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has no event
                await asyncio.sleep(0.005)
            started.append((server, service, ledger, asyncio.get_running_loop()))
            ready.set()
            await task

    def run() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(120)
    if failed:
        thread.join(60)
        raise failed[0]
    [(server, service, ledger, loop)] = started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            yield Trial(http=http, service=service, ledger=ledger, config=config, loop=loop)
    finally:
        server.should_exit = True
        thread.join(60)
        ledger.database.dispose()


def log_coins(
    database: Database,
    number: int,
    *,
    score: Callable[[int, bool], bool],
    text: Callable[[int], str | None] = lambda _: None,
) -> None:
    """Log answered requests of the experiment "e" whose arms coins chose (seed 0).

    `score` says of a request and its arm (whether it is the new one) if the answer was right,
    `text` what the ledger kept of the question.
    """
    rng = np.random.default_rng(0)
    for i in range(number):
        new = bool(rng.random() < 0.5)
        member = "dear" if new else "cheap"
        answered = record(
            i,
            time_s=4e9 + i,
            experiment="e",
            arm="new" if new else "control",
            policy="large" if new else "small",
            unit=f"u{i}",
            propensity=0.5,
            plan={"answer": {"members": [member], "rule": "mixture"}},
            members={member: MemberTokens(output_tokens=3)},
            query_text=text(i),
        )
        keep(database, [answered])
        rated = Feedback(request_id=answered.request_id, time_s=4e9, score=float(score(i, new)))
        add_feedback(database, rated)
