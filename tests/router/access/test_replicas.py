"""The whole promise on real Ray: replicas, load, streams, clients that leave, a replica killed."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil
import pytest
import sqlalchemy as sa

from router.ledger.database import Database, open_database
from router.ledger.queries import requests
from router.ledger.schema import BUDGET_HOLDS, BUDGET_WINDOWS
from tests.server import serving

# As many clients as the cap has room for at once, so that the last tokens are fought for; one
# request's estimate is less than the 1% that may be left.
CAP_TOKENS = 15_000
MAX_TOKENS = 60
NUM_CLIENTS = 200
NUM_REPLICAS = 4
FLUSH_S = 0.2
# Longer than any process here is ever held up: who lives must not lose what it holds.
LEASE_S = 20

CONFIG = {
    "ingress": {"min_replicas": NUM_REPLICAS, "max_replicas": NUM_REPLICAS},
    "ledger": {"url": "sqlite:///rows.db", "flush_interval_s": FLUSH_S},
    "budgets": {"server": {"tokens_per_month": CAP_TOKENS}, "wait_s": 5, "lease_s": LEASE_S},
}
POOL = {
    "engines": [
        {
            "name": "one",
            "kind": "fake",
            "options": {
                "answers": ["x" * length for length in (10, 30, 50, 59)],
                "token_latency_s": 0.002,
            },
        }
    ],
    "models": [{"name": "alpha", "engine": "one", "usd_per_million_output_tokens": 1}],
    "policies": {},
}


class Load:
    """Clients that ask until the budget is spent for good, and what they saw."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: Counter[str] = Counter()
        self.used_tokens = 0
        self.ids: list[str] = []
        self._third_used = asyncio.Event()

    async def run(self, kill: psutil.Process) -> None:
        """Run all clients; kill process `kill` when a third of the budget is used."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as http:
            clients = [self._client(http, Random(seed)) for seed in range(NUM_CLIENTS)]
            await asyncio.gather(self._killer(kill), *clients)

    async def _killer(self, replica: psutil.Process) -> None:
        await self._third_used.wait()
        replica.kill()
        self.seen["killed"] += 1

    async def _client(self, http: httpx.AsyncClient, random: Random) -> None:
        while True:
            try:
                ask = random.choice([self._whole, self._streamed, self._streamed, self._leaving])
                response = await ask(http, random)
            except httpx.TransportError:
                self.seen["cut off"] += 1  # by the replica's death
                continue
            if response is None:
                continue
            if response.status_code == 429:
                error = response.json()["error"]
                if response.headers["x-should-retry"] == "false":
                    assert error["code"] == "insufficient_quota"
                    assert "tokens per month of the server is exhausted" in error["message"]
                    self.seen["exhausted"] += 1
                    return
                self.seen["held by others"] += 1
                await asyncio.sleep(float(response.headers["retry-after"]) * random.random())
            else:
                self.seen[f"status {response.status_code}"] += 1
                await asyncio.sleep(0.2 * random.random())

    def _body(self, stream: bool) -> dict[str, Any]:
        return {
            "model": "alpha",
            "max_tokens": MAX_TOKENS,
            "messages": [{"role": "user", "content": "hello"}],
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }

    def _note(self, answer: dict[str, Any]) -> None:
        self.ids.append(answer["id"])
        self.used_tokens += answer["usage"]["total_tokens"]
        if self.used_tokens > CAP_TOKENS / 3:
            self._third_used.set()

    async def _whole(self, http: httpx.AsyncClient, random: Random) -> httpx.Response | None:
        response = await http.post("/v1/chat/completions", json=self._body(stream=False))
        if response.status_code != 200:
            return response
        self._note(response.json())
        self.seen["whole"] += 1
        return None

    async def _streamed(self, http: httpx.AsyncClient, random: Random) -> httpx.Response | None:
        return await self._stream(http, leave_after=None)

    async def _leaving(self, http: httpx.AsyncClient, random: Random) -> httpx.Response | None:
        return await self._stream(http, leave_after=random.randint(1, 20))

    async def _stream(
        self, http: httpx.AsyncClient, leave_after: int | None
    ) -> httpx.Response | None:
        body = self._body(stream=True)
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return response
            num_lines = 0
            async for line in response.aiter_lines():
                num_lines += 1
                if leave_after is not None and num_lines > leave_after:
                    self.seen["left"] += 1
                    return None
                if line.startswith("data: {") and json.loads(line[6:]).get("usage"):
                    self._note(json.loads(line[6:]))
                    self.seen["streamed"] += 1
        return None


@pytest.mark.ray
@pytest.mark.load
@pytest.mark.timeout(600)
def test_a_cap_holds_under_load_over_four_replicas_one_of_them_killed(tmp_path: Path) -> None:
    """200 clients spend at least 99% of a cap, never more, and no request is charged twice.

    They stream, leave, and lose a replica to SIGKILL on the way; each goes on until it is told
    that the budget is spent. Seeds 0 to 199.
    """
    with serving(tmp_path, config=CONFIG, **POOL) as server:
        replicas = server.family("ray::ServeReplica:shoal:ingress")
        assert len(replicas) == NUM_REPLICAS
        load = Load(server.url)
        asyncio.run(load.run(kill=replicas[0]))
        database = open_database(f"sqlite:///{tmp_path / 'rows.db'}")
        spent = _spent_when_nothing_is_held(database)
    rows = list(requests(database))
    database.dispose()
    ran = {row["request_id"]: row for row in rows if row["answered_by"] is not None}
    in_ledger = sum(row["prompt_tokens"] + row["output_tokens"] for row in ran.values())

    assert load.seen["exhausted"] == NUM_CLIENTS and load.seen["killed"] == 1
    assert min(load.seen[kind] for kind in ("whole", "streamed", "left")) > 0, load.seen
    assert 0.99 * CAP_TOKENS <= spent <= CAP_TOKENS, load.seen
    # The killed replica took the rows of its last flush interval with it; what they had used was
    # charged already.
    assert in_ledger <= spent
    lost = [name for name in load.ids if name not in ran]
    assert len(set(load.ids)) == len(load.ids)
    assert len(lost) < len(load.ids) / 4
    assert load.used_tokens <= spent


def _spent_when_nothing_is_held(database: Database) -> int:
    """Return the tokens spent, once every hold was settled or given back."""
    deadline_s = time.monotonic() + 60 + LEASE_S
    while True:
        with database.connect() as connection:
            [window] = connection.execute(sa.select(BUDGET_WINDOWS)).mappings()
            live = connection.execute(sa.select(BUDGET_HOLDS).where(~BUDGET_HOLDS.c.lapsed)).all()
        if not live and window["held_tokens"] == 0:
            return int(window["spent_tokens"])
        assert time.monotonic() < deadline_s, (window, live)
        time.sleep(0.1)
