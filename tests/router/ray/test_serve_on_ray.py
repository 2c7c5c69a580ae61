"""The whole application on Ray Serve, as `shoal serve` starts it: one server for this file."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import sqlalchemy as sa
import yaml

from router.ledger.database import open_database
from router.ledger.schema import REQUESTS
from tests.ports import free_port
from tests.router.conftest import write_pool

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

# Runs for longer than any test waits: who frees its lane has cancelled it.
SLOW = {"answers": ["x" * 1000], "token_latency_s": 0.2}
POOL = {
    "engines": [
        {"name": "one", "kind": "fake", "options": {"models": {"beta": SLOW}}},
        {"name": "two", "kind": "fake", "options": {"models": {"gamma": SLOW, "full": {}}}},
        {"name": "three", "kind": "fake", "options": {"refuse": True}},
    ],
    "models": [
        {"name": "alpha", "engine": "one"},
        {"name": "beta", "engine": "one"},
        {"name": "gamma", "engine": "two"},
        {"name": "full", "engine": "two"},
        {"name": "busy", "engine": "three"},
    ],
}

# Programs by their command lines, as docs/operations.md names them.
PROGRAMS = {
    "shoal serve": r"router\.cli serve",
    "keeper": r"router/keeper\.py ",
    "HAProxy": r"^\S*haproxy -db ",
    "HAProxy's manager": r"^ray::HAProxyManager",
    "Serve's own proxy": r"^ray::ProxyActor",
    "Serve's controller": r"^ray::ServeController",
    "ingress replica": r"^ray::ServeReplica:shoal:ingress",
    "engine replica": r"^ray::ServeReplica:shoal:engine",
    "idle worker": r"^ray::IDLE",
    "GCS": r"^\S*/gcs_server ",
    "raylet": r"^\S*/raylet ",
    "dashboard agent": r"dashboard/agent\.py|DashboardAgent",
    "runtime environment agent": r"runtime_env/agent|RuntimeEnvAgent",
    "autoscaler": r"autoscaler/\S*monitor\.py",
    "dashboard": r"dashboard/dashboard\.py",
}


@dataclass
class Served:
    """A server process."""

    process: subprocess.Popen[str]
    port: int
    said: str
    folder: Path

    @property
    def http(self) -> httpx.Client:
        """A client of the server."""
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def post(self, model: str, **fields: Any) -> httpx.Response:
        """Ask `model` to echo "hello"."""
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": model, "messages": messages, **fields}
        with self.http as http:
            return http.post("/v1/chat/completions", json=body)

    def stats(self, engine: str) -> dict[str, Any]:
        """Return what an engine's replicas say of themselves."""
        with self.http as http:
            return dict(http.get("/health").json()["engines"][engine])

    def processes(self) -> dict[int, str]:
        """Return the command lines of the server's processes by pid, itself included."""
        parents: dict[int, int] = {}
        lines: dict[int, str] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                if status[0] != "Z":
                    parents[int(entry.name)] = int(status[1])
                    text = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    lines[int(entry.name)] = text.decode(errors="replace")
        mine = {self.process.pid}
        for _ in range(10):
            mine |= {pid for pid, parent in parents.items() if parent in mine}
        return {pid: lines[pid] for pid in mine if pid in lines}

    def kill_replicas(self, engine: str) -> None:
        """Kill -9 the engine's replicas."""
        name = f"engine-{engine}"
        found = [pid for pid, line in self.processes().items() if name in line and "ray::" in line]
        assert found
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def listening(self) -> set[tuple[str, str]]:
        """Return which of its programs listen on TCP: who, and whether to all or to loopback."""
        found = set()
        for pid, line in self.processes().items():
            who = next((name for name, told in PROGRAMS.items() if re.search(told, line)), line)
            for one in psutil.Process(pid).net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    address = ip_address(one.laddr.ip.removeprefix("::ffff:"))
                    found.add((who, "loopback" if address.is_loopback else "all interfaces"))
        return found


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Start `shoal serve` on a pool of three scripted engines, with two ingress replicas."""
    folder = tmp_path_factory.mktemp("pool")
    write_pool(folder, policies={}, **POOL)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "pool": ".",
                "ledger": {"url": "sqlite:///rows.db"},
                "ingress": {"min_replicas": 2, "max_replicas": 2},
            }
        )
    )
    port = free_port()
    command = [sys.executable, "-m", "router.cli", "serve", "--config", "config.yaml"]
    with subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "curl" in line:
                break
        try:
            assert "Ready at" in said, said
            yield Served(process, port, said, folder)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def test_answers_whole_and_streamed(served: Served) -> None:
    """The openai client gets the same answer both ways, with usage and the shoal object."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x") as client:
        messages: Any = [{"role": "user", "content": "Grüße"}]
        whole: Any = client.chat.completions.create(model="auto", messages=messages)
        assert whole.choices[0].message.content == "Grüße"
        assert whole.usage.completion_tokens == 8
        assert whole.shoal["members"] == ["alpha"]
        stream: Any = client.chat.completions.create(
            model="auto", messages=messages, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Grüße"
    assert last.usage.completion_tokens == 8
    assert last.shoal["members"] == ["alpha"]


def test_says_which_ingress_it_uses(served: Served) -> None:
    """The start tells whether HAProxy and the throughput flags are on."""
    assert "HAProxy" in served.said
    assert "throughput-optimised" in served.said


def test_headers_stand_once(served: Served) -> None:
    """Ray Serve's request id and ours don't both appear."""
    response = served.post("alpha")
    assert len(response.headers.get_list("x-request-id")) == 1
    assert int(response.headers["openai-processing-ms"]) >= 1


def test_errors_cross_the_hop(served: Served) -> None:
    """An engine's refusals keep their status and meaning: 429 with times, 400 with the code."""
    for stream in (False, True):
        full = served.post("busy", stream=stream)
        assert full.status_code == 429
        assert full.json()["error"]["code"] == "overloaded"
        assert int(full.headers["retry-after"]) >= 1
        long = served.post("alpha", max_tokens=10_000, stream=stream)
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_plans_span_engines(served: Served) -> None:
    """A cascade whose first stage is refused goes on to another engine, and says so."""
    plan = {"cascade": {"stages": ["busy", "alpha"], "thresholds": [0.5]}}
    shoal = served.post("auto", shoal={"plan": plan, "explain": True}).json()["shoal"]
    assert [stage["outcome"] for stage in shoal["stages"]] == ["ok", "failed", "ok"]
    assert shoal["members"] == ["alpha"]


def test_every_replica_takes_up_new_policies(served: Served) -> None:
    """Reloaded over HTTP or by SIGHUP, every ingress replica answers by them, without a restart."""

    def answers(policy: str) -> bool:
        return all(served.post(f"policy/{policy}").status_code == 200 for _ in range(8))

    for number, policy in enumerate(("first", "second"), 2):
        assert served.post(f"policy/{policy}").status_code == 404
        write_pool(served.folder, policies={policy: {"kind": "fixed", "plan": "alpha"}}, **POOL)
        with served.http as http:
            if policy == "first":
                assert http.post("/v1/admin/reload").json()["number"] == number
            else:
                served.process.send_signal(signal.SIGHUP)
        _wait(lambda policy=policy: answers(policy))
        with served.http as http:
            assert http.get("/v1/admin/edition").json()["number"] == number
    assert served.post("policy/first").status_code == 404, "it is no more"
    rows = open_database(f"sqlite:///{served.folder}/rows.db")
    query = sa.select(REQUESTS.c.edition).where(REQUESTS.c.status == 200).distinct()

    def answered_by() -> set[int]:
        with rows.connect() as connection:
            return set(connection.execute(query).scalars())

    _wait(lambda: answered_by() >= {2, 3})
    rows.dispose()


def test_ports_are_those_that_the_documentation_lists(served: Served) -> None:
    """Who listens, and who of them to others than this machine, stands in docs/operations.md."""
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    table = text.partition("| who listens | where |")[2].partition("\n\n")[0]
    rows = {tuple(map(str.strip, line.split("|")[1:3])) for line in table.splitlines()[2:]}
    found = served.listening()
    assert found <= rows
    assert {who for who, where in found if where != "loopback"} == {
        who for who, where in rows if where != "loopback"
    }


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_lane(served: Served, stream: bool) -> None:
    """The client's disconnect reaches the engine's replica through every proxy."""
    data = json.dumps(
        {"model": "beta", "stream": stream, "messages": [{"role": "user", "content": "x"}]}
    ).encode()
    connection = socket.create_connection(("127.0.0.1", served.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    _wait(lambda: served.stats("one")["active_lanes"] == 1)
    connection.close()
    _wait(lambda: served.stats("one")["active_lanes"] == 0)


def test_a_killed_engine_fails_over_and_comes_back(served: Served) -> None:
    """Mid-answer: 503 for its own request, the next stage for a cascade; then it is replaced."""
    from concurrent.futures import ThreadPoolExecutor

    plan = {"cascade": {"stages": ["gamma", "alpha"], "thresholds": [0.0]}}
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(served.post, "gamma")
        covered = pool.submit(served.post, "auto", shoal={"plan": plan})
        _wait(lambda: served.stats("two")["active_lanes"] == 2)
        served.kill_replicas("two")
        failed = alone.result()
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_failed")
        answer = covered.result().json()
        assert answer["choices"][0]["message"]["content"] == "hello"
        assert answer["shoal"]["members"] == ["alpha"]
    _wait(lambda: served.post("full").status_code == 200)


def test_stops_everything_it_started(served: Served, tmp_path_factory: Any) -> None:
    """Ctrl-C in the terminal ends the command with 0 and leaves no process of Ray's (runs last)."""
    started = served.processes()
    assert len(started) > 5
    os.killpg(served.process.pid, signal.SIGINT)
    assert served.process.wait(180) == 0
    assert served.process.stdout is not None
    assert served.process.stdout.read().splitlines()[-1] == "Stopped."
    _wait(lambda: not any(_is_running(pid) for pid in started))
    with pytest.raises(httpx.ConnectError):
        served.post("alpha")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
