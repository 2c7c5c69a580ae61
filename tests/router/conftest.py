"""A real server in this process, on real HTTP, with scripted engines."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
import yaml

from models.pool import load_pool
from router.config import AppArgs
from router.editions import catalog_of
from router.ledger.database import open_database
from router.ledger.writer import Ledger
from router.local import http_server, local_service
from router.logs import LOGGERS, REQUESTS_LOGGER
from router.metrics.counting import count_rows
from router.record import RequestRecord
from router.service import Service
from tests.router.ledger.fixtures import (  # noqa: F401 (fixtures of ledger, keys and caps)
    database,
    ledger_url,
    new_ledger,
    postgresql_server,
)


class KeepingLedger(Ledger):
    """A ledger that also keeps its records in memory, as they came."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.records: list[RequestRecord] = []
        super().__init__(*args, **options)

    def record(self, record: RequestRecord) -> None:
        """Keep `record`."""
        self.records.append(record)
        super().record(record)


@dataclass
class Running:
    """A running server and the ways to ask it."""

    url: str
    service: Service
    ledger: KeepingLedger
    http: httpx.Client
    client: openai.OpenAI
    server: uvicorn.Server
    loop: asyncio.AbstractEventLoop
    streams: list[Any] = field(default_factory=list)

    def chat(self, text: str = "hello", model: str = "alpha", **fields: Any) -> Any:
        """Ask for a chat completion through the openai client."""
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        return self.client.chat.completions.create(model=model, messages=messages, **fields)

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        """Post a JSON body; chat messages and a model are filled in where missing."""
        if path.endswith("chat/completions"):
            body.setdefault("messages", [{"role": "user", "content": "hello"}])
        body.setdefault("model", "alpha")
        return self.http.post(path, json=body)

    def settle(self) -> None:
        """Wait until nothing runs, and every record is in that follows an answer already read."""
        tasks, settling = self.server.server_state.tasks, self.service.accounts.settling
        self.wait(lambda: not tasks and not settling)
        # What the last of them asked the loop to do comes before this.
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result(60)
        self.wait(lambda: not settling)  # policies are told when the record is in

    def forget(self) -> None:
        """Forget all records, also those that are still to come."""
        self.settle()
        self.ledger.records.clear()

    def wait(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        """Wait until `condition` holds; the limit is for what would never hold."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)

    def last_record(self) -> RequestRecord:
        """Return the only record since the last call, waiting for it."""
        self.wait(lambda: bool(self.ledger.records))
        [record] = self.ledger.records
        self.ledger.records.clear()
        return record


def write_pool(folder: Path, **changes: Any) -> Path:
    """Write a pool of scripted models: engine one runs alpha and beta, engine two gamma."""
    content: dict[str, Any] = {
        "name": "test-pool",
        "engines": [
            {"name": "one", "kind": "fake", "options": {}},
            {"name": "two", "kind": "fake", "options": {}},
        ],
        "models": [
            {
                "name": "alpha",
                "engine": "one",
                "usd_per_million_input_tokens": 1,
                "usd_per_million_output_tokens": 2,
                "domains": ["tests"],
            },
            {"name": "beta", "engine": "one", "usd_per_million_output_tokens": 4},
            {"name": "gamma", "engine": "two"},
        ],
        "policies": {"auto": {"kind": "fixed", "plan": "beta"}},
    }
    content.update(changes)
    file = folder / "pool.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@contextmanager
def running(
    folder: Path,
    *,
    limits: dict[str, Any] | None = None,
    app: dict[str, Any] | None = None,
    **changes: Any,
) -> Iterator[Running]:
    """Serve scripted models on a free port; `app` adds to the configuration."""
    args = AppArgs.model_validate(
        {
            "pool": write_pool(folder, **changes),
            "limits": limits or {},
            "ledger": {"url": f"sqlite:///{folder}/shoal.db"},
            **(app or {}),
        }
    )
    pool = load_pool(args.pool)
    catalog = catalog_of(args, pool)
    ledger = KeepingLedger(
        open_database(args.ledger.url),
        flush_interval_s=args.ledger.flush_interval_s,
        count=count_rows,
        logger=logging.getLogger("test.ledger"),
    )
    ready, started = threading.Event(), []

    async def serve() -> None:
        async with local_service(args, pool, catalog, ledger) as service:
            server = http_server(service, host="127.0.0.1", port=0, args=args)
            started.append((server, service, asyncio.get_running_loop()))
            task = asyncio.create_task(server.serve())
            while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has no event
                await asyncio.sleep(0.005)
            ready.set()
            await task

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(120)
    [(server, service, loop)] = started
    try:
        url = f"http://127.0.0.1:{_port(server)}"
        with (
            httpx.Client(base_url=url, timeout=120) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            yield Running(url, service, ledger, http, client, server, loop)
    finally:
        server.should_exit = True
        thread.join(60)


def _port(server: uvicorn.Server) -> int:
    return int(server.servers[0].sockets[0].getsockname()[1])


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """Whatever served in this process and set up logs leaves none of that to the next test."""
    loggers = [logging.getLogger(name) for name in (*LOGGERS, REQUESTS_LOGGER)]
    before = [(x.level, list(x.handlers), x.propagate) for x in loggers]
    yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server of echoing models for a whole module."""
    with running(tmp_path_factory.mktemp("pool")) as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """The module's server, its records forgotten."""
    shared.forget()
    yield shared


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that serves a pool with given engines, models, policies or limits."""
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(running(tmp_path, **changes))
