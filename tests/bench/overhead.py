"""What Shoal adds to a request: its whole stack against a bare Ray Serve echo with one hop.

Both applications run in the same Ray Serve instance, with the ingress that `shoal serve` would
use; one client asks them in turn on a kept connection. Shoal's engine is the scripted one and
answers one token at once, so that everything but the model is measured: HTTP, validation, chat
template, policy, executor, the hop to the engine's replica, usage, cost and the row in an SQLite
ledger. The echo takes the same body through FastAPI into a pydantic model and makes one unary call
to a second deployment.

The ceiling is a ratio of 1; the target is at most 1.3 at the median.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

_POOL = """
name: overhead
engines:
- {name: scripted, kind: fake, options: {answers: ["x"]}}
models:
- {name: model, engine: scripted}
"""
_BODY = {
    "model": "auto",
    "messages": [{"role": "user", "content": "What is 37 + 58?"}],
    "max_tokens": 1,
}
_TARGET = 1.3


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure, and return the row of the table."""
    from router.cluster import local_cluster, prepared_environment
    from router.haproxy import find_haproxy
    from router.ports import free_port

    haproxy, port = find_haproxy(), free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        prepared_environment(Path(folder), haproxy),
    ):
        Path(folder, "pool.yaml").write_text(_POOL)
        with local_cluster():
            _deploy(Path(folder), port)
            echo_s, shoal_s = _measure(port, rounds=200 if quick else 1500)
    echo_ms, shoal_ms = (statistics.median(times) * 1000 for times in (echo_s, shoal_s))
    ratios = [shoal / echo for shoal, echo in zip(shoal_s, echo_s, strict=True)]
    return [
        {
            "name": "request overhead, p50 of a one-token request against a one-hop echo",
            "unit": "ratio",
            "ceiling": 1.0,
            "target": _TARGET,
            "measured": round(shoal_ms / echo_ms, 3),
            "shoal_ms": round(shoal_ms, 3),
            "echo_ms": round(echo_ms, 3),
            "median_of_paired_ratios": round(statistics.median(ratios), 3),
            "pairs": len(ratios),
            "haproxy": haproxy is not None,
            "ok": shoal_ms / echo_ms <= _TARGET,
        }
    ]


def _deploy(folder: Path, port: int) -> None:
    from ray import serve

    from router.app import build
    from router.config import AppArgs
    from router.ledger.database import LedgerConfig
    from tests.bench.echo import application

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(), name="echo", route_prefix="/echo")
    ledger = LedgerConfig(url=f"sqlite:///{folder}/ledger.db")
    serve.run(build(AppArgs(pool=folder, ledger=ledger)), name="shoal", route_prefix="/")


def _measure(port: int, *, rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each request, asked in turn; the first tenth warms up."""
    import httpx

    paths = ("/echo/v1/chat/completions", "/v1/chat/completions")
    times: tuple[list[float], list[float]] = ([], [])
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for index in range(rounds + rounds // 10):
            for path, seconds in zip(paths, times, strict=True):
                started = time.perf_counter()
                response = client.post(path, json=_BODY)
                if index >= rounds // 10:
                    seconds.append(time.perf_counter() - started)
                response.raise_for_status()
    return times


if __name__ == "__main__":
    import json
    import sys

    for row in run("--quick" in sys.argv):
        print(json.dumps(row))
