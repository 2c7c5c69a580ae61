"""`make test-load`: memory does not grow with the requests that were served."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from models.pool import load_pool
from router.access.keys import create_key
from router.compose import open_ledger
from router.config import AppArgs
from router.editions import catalog_of
from router.ingress import create_api
from router.local import local_service
from tests.router.conftest import write_pool

pytestmark = [pytest.mark.load, pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

NUM_REQUESTS = int(os.environ.get("SHOAL_LOAD_REQUESTS", "200000"))
NUM_CLIENTS = 8
PLAN = {"cascade": {"stages": ["alpha", "beta"], "thresholds": [1.0], "scorer": "confidence"}}
POOL: dict[str, Any] = {
    "engines": [{"name": "one", "kind": "fake", "options": {"answers": ["x"]}}],
    "models": [{"name": "alpha", "engine": "one"}, {"name": "beta", "engine": "one"}],
    "policies": {"auto": {"kind": "fixed", "plan": PLAN}},
}


async def _post(api: Any, path: str, body: dict[str, Any], key: str) -> int:
    """Send one request as a server would, without its sockets; return the status."""
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    sent, statuses = False, []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # the client stays, and says nothing more
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await api(scope, receive, send)
    return int(statuses[0])


def _request(number: int) -> tuple[str, dict[str, Any]]:
    """Return the request of that number: every one has another text, user and session."""
    chat = {
        "model": ("auto", "alpha", f"nobody-{number}")[number % 3],
        "messages": [{"role": "user", "content": f"question {number}"}],
        "user": f"user-{number}",
        "max_tokens": 1 + number % 7,
        "stream": number % 5 == 0,
        "shoal": {"session": f"session-{number}"},
    }
    if number % 11 == 0:
        return "/v1/completions", {"model": "beta", "prompt": f"text {number}", "max_tokens": 1}
    if number % 13 == 0:
        return "/v1/feedback", {"id": f"chatcmpl-{number}", "score": 2}
    return "/v1/chat/completions", chat


def _memory_mb() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def test_memory_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After all requests the process takes at most a tenth more than after a tenth of them.

    Keyed, capped, answered, streamed and refused ones, with a ledger, through the whole stack but
    HTTP's parser. SHOAL_LOAD_REQUESTS says how many (200,000).
    """
    args = AppArgs.model_validate(
        {
            "pool": write_pool(tmp_path, **POOL),
            "ledger": {"url": f"sqlite:///{tmp_path}/rows.db"},
            "budgets": {"server": {"requests_per_day": 10**9}},
        }
    )
    memory: list[float] = []

    async def serve() -> None:
        catalog = catalog_of(args, load_pool(args.pool))
        ledger = open_ledger(args)
        _, secret = create_key(ledger.database, name="app", caps={"tokens_per_day": 10**9})
        async with local_service(args, load_pool(args.pool), catalog, ledger) as service:
            api = create_api(service, args)
            async with api.router.lifespan_context(api):
                numbers = iter(range(NUM_REQUESTS))

                async def client() -> None:
                    for number in numbers:
                        path, body = _request(number)
                        status = await _post(api, path, body, secret)
                        assert status in (200, 400, 404), status
                        if number in (NUM_REQUESTS // 10, NUM_REQUESTS - 1):
                            await ledger.flush(within_s=60)
                            memory.append(_memory_mb())

                await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))

    asyncio.run(serve())
    early, late = memory
    with capsys.disabled():
        told = f"{early:.1f} MiB after {NUM_REQUESTS // 10:,} requests, {late:.1f} after"
        sys.stdout.write(f"\n{told} {NUM_REQUESTS:,}\n")
    assert late <= 1.1 * early
