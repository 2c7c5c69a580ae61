"""Requests per second through the whole stack, beside a bare Ray Serve hop and LiteLLM's proxy.

Shoal (on Ray, with one and with two ingress replicas) and LiteLLM's proxy (one and two workers)
stand before the same upstream, a server in C's event loop that answers at once; the hop is the
least that a Ray Serve application with a second deployment can do, without an upstream. All of them
run at the same time and are asked in turn, so that whatever else the machine does hits them alike.
Shoal keeps a row of every request in its ledger, LiteLLM has no database. The clients, their number
given, ask as fast as they are answered, over kept connections, from this process: they take their
share of the same cores.

The aim is 1.5 times LiteLLM's requests per second, replica against worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.tables import text_table

CLIENTS = (1, 8, 32, 64)
_LITELLM = (".venv-clients/bin/python", "-m", "litellm.proxy.proxy_cli")
_BODY = {"model": "model", "messages": [{"role": "user", "content": "What is 37 + 58?"}]}
_POOL = """
name: load
engines:
- {{name: far, kind: remote, options: {{base_url: "http://127.0.0.1:{port}/v1", logprobs: false,
    max_connections: 256}}}}
models:
- {{name: model, engine: far, remote: {{}}}}
"""
_PROXY = """
model_list:
- model_name: model
  litellm_params: {{model: openai/model, api_base: "http://127.0.0.1:{port}/v1", api_key: none}}
general_settings: {{dangerously_permit_weak_or_unset_master_key: true}}
"""
_SECONDS = 4.0
_WARM_UP_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What `num_clients` saw of one system in one stretch; times in milliseconds."""

    system: str
    num_clients: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float


class Upstream(asyncio.Protocol):
    """Answers every request at once with one word: an event stream where that is asked for."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Answer whatever is whole."""
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].lower()
            _, _, length = head.partition(b"content-length:")
            whole = end + 4 + int(length.split(b"\r\n", 1)[0] or 0)
            if len(self._received) < whole:
                return
            body, self._received = self._received[end + 4 : whole], self._received[whole:]
            streams = b'"stream":true' in body.replace(b" ", b"")
            self._transport.write(_STREAMED if streams else _WHOLE)


def _answers() -> tuple[bytes, bytes]:
    """Return the upstream's answer whole, and as events."""
    head = {"id": "c", "created": 1, "model": "model"}
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    message = {"role": "assistant", "content": "Well."}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": message, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    ]
    head |= {"object": "chat.completion.chunk"}
    lines = [f"data: {json.dumps({**head, **event})}\n\n" for event in events]
    return (
        _response("application/json", json.dumps(whole)),
        _response("text/event-stream", "".join([*lines, "data: [DONE]\n\n"])),
    )


def _response(kind: str, body: str) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


_WHOLE, _STREAMED = _answers()


async def _serve_upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    await server.serve_forever()


def run() -> list[Figure]:
    """Start everything, measure, print figures as they come, and return them."""
    from router.cluster import local_cluster, prepared_environment
    from router.haproxy import find_haproxy
    from router.ports import free_port

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream, ray_port = free_port(), free_port()
        stack.enter_context(_process(sys.executable, "-m", __spec__.name, "upstream", upstream))
        urls = {"upstream itself": f"http://127.0.0.1:{upstream}"}
        for num_workers in (1, 2):
            port = free_port()
            urls[f"LiteLLM's proxy, {num_workers}"] = f"http://127.0.0.1:{port}"
            stack.enter_context(_litellm(folder, upstream, port, num_workers))
        stack.enter_context(prepared_environment(folder, find_haproxy()))
        _say("starting Ray ...")
        stack.enter_context(local_cluster())
        urls |= _deploy(folder, upstream, ray_port)
        for system, url in urls.items():
            _say(f"waiting for {system} ...")
            _wait_for(url)
        return [
            _measure(system, url, num_clients)
            for num_clients in CLIENTS
            for system, url in urls.items()
        ]


def _deploy(folder: Path, upstream: int, port: int) -> dict[str, str]:
    """Deploy the hop and Shoal twice; return where each is."""
    from ray import serve

    from models.spec import DeploymentSpec
    from router.app import build
    from router.config import AppArgs
    from router.ledger.database import LedgerConfig
    from tests.bench.echo import application

    (folder / "pool.yaml").write_text(_POOL.format(port=upstream))
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(), name="echo", route_prefix="/echo")
    urls = {"a bare hop on Ray Serve": f"http://127.0.0.1:{port}/echo"}
    for num_replicas in (1, 2):
        name = f"shoal{num_replicas}"
        args = AppArgs(
            pool=folder,
            ledger=LedgerConfig(url=f"sqlite:///{folder}/{name}.db"),
            ingress=DeploymentSpec(
                num_cpus=0.1, min_replicas=num_replicas, max_replicas=num_replicas
            ),
        )
        serve.run(build(args), name=name, route_prefix=f"/{name}")
        urls[f"Shoal, {num_replicas}"] = f"http://127.0.0.1:{port}/{name}"
    return urls


@contextlib.contextmanager
def _litellm(folder: Path, upstream: int, port: int, num_workers: int) -> Iterator[None]:
    config = folder / "litellm.yaml"
    config.write_text(_PROXY.format(port=upstream))
    command = [*_LITELLM, "--config", config, "--host", "127.0.0.1", "--port", port]
    with _process(*command, "--num_workers", num_workers):
        yield


@contextlib.contextmanager
def _process(*command: object) -> Iterator[None]:
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **quiet},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str, within_s: float = 600) -> None:
    """Wait until `url` answers."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps({**_BODY, "max_tokens": 1}).encode(),
        {"content-type": "application/json"},
    )
    end = time.monotonic() + within_s
    while True:
        try:
            urllib.request.urlopen(request, timeout=30).read()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
        else:
            return


def _measure(system: str, url: str, num_clients: int) -> Figure:
    times_s = asyncio.run(_ask(url, num_clients))
    percentiles = statistics.quantiles(times_s, n=100)
    figure = Figure(
        system=system,
        num_clients=num_clients,
        requests_per_s=round(len(times_s) / _SECONDS, 1),
        p50_ms=round(percentiles[49] * 1000, 1),
        p99_ms=round(percentiles[98] * 1000, 1),
    )
    _say(
        f"{num_clients:3} clients, {system:<24} {figure.requests_per_s:8} requests/s, "
        f"p50 {figure.p50_ms} ms, p99 {figure.p99_ms} ms"
    )
    return figure


async def _ask(url: str, num_clients: int) -> list[float]:
    """Return the seconds of each answer that came in time, after warming up."""
    import aiohttp

    times_s: list[float] = []
    start = time.perf_counter() + _WARM_UP_S
    end = start + _SECONDS
    body = json.dumps({**_BODY, "max_tokens": 16})
    headers = {"content-type": "application/json", "authorization": "Bearer none"}
    connections = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connections, headers=headers) as session:

        async def one_client() -> None:
            while (asked := time.perf_counter()) < end:
                async with session.post(f"{url}/v1/chat/completions", data=body) as response:
                    await response.read()
                    response.raise_for_status()
                answered = time.perf_counter()
                if start <= asked and answered <= end:
                    times_s.append(answered - asked)

        await asyncio.gather(*(one_client() for _ in range(num_clients)))
    return times_s


def _table(figures: list[Figure]) -> str:
    """Return requests/s and p50 / p99 by system and number of clients, and who is ahead."""
    found = {(figure.system, figure.num_clients): figure for figure in figures}
    lines: list[tuple[str, ...]] = [("requests/s (p50 / p99 in ms)", *map(str, CLIENTS))]
    for system in dict.fromkeys(figure.system for figure in figures):
        cells = [found[system, number] for number in CLIENTS]
        lines.append(
            (system, *(f"{c.requests_per_s:.0f} ({c.p50_ms} / {c.p99_ms})" for c in cells))
        )
    for num in (1, 2):
        ratios = [
            found[f"Shoal, {num}", number].requests_per_s
            / found[f"LiteLLM's proxy, {num}", number].requests_per_s
            for number in CLIENTS
        ]
        lines.append((f"Shoal / LiteLLM, {num}", *(f"{ratio:.2f}" for ratio in ratios)))
    return text_table(lines, num_left=1)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["upstream"]:
        asyncio.run(_serve_upstream(int(sys.argv[2])))
    else:
        measured = run()
        print(_table(measured))
        print(json.dumps([vars(figure) for figure in measured]))
