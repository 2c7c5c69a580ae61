"""The whole application on Ray Serve, as `shoal serve` starts it: one server for this file."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import sqlalchemy as sa

from router.ledger.database import open_database
from router.ledger.schema import REQUESTS
from tests.router.conftest import running, write_pool
from tests.server import Server, runs, serving, until

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


def listening(served: Server) -> set[tuple[str, str]]:
    """Return which of its programs listen on TCP: who, and whether to all or to loopback."""
    found = set()
    for process in [psutil.Process(served.process.pid), *served.family()]:
        line = " ".join(process.cmdline())
        who = next((name for name, told in PROGRAMS.items() if re.search(told, line)), line)
        for one in process.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN:
                address = ip_address(one.laddr.ip.removeprefix("::ffff:"))
                found.add((who, "loopback" if address.is_loopback else "all interfaces"))
    return found


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Three scripted engines, and one that asks another server for a slow model."""
    with running(tmp_path_factory.mktemp("far"), **POOL) as far:
        options = {"base_url": f"{far.http.base_url}/v1", "logprobs": False}
        engines = [*POOL["engines"], {"name": "far", "kind": "remote", "options": options}]
        distant = {"name": "distant", "engine": "far", "remote": {"model": "beta"}}
        yield {"engines": engines, "models": [*POOL["models"], distant]}


@pytest.fixture(scope="module")
def served(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start `shoal serve` on that pool, with two ingress replicas."""
    config = {"ingress": {"min_replicas": 2, "max_replicas": 2}}
    with serving(tmp_path_factory.mktemp("pool"), config=config, policies={}, **pool) as server:
        yield server


def test_answers_whole_and_streamed(served: Server) -> None:
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


def test_says_which_ingress_it_uses(served: Server) -> None:
    """The start tells whether HAProxy and the throughput flags are on."""
    assert "HAProxy" in served.text
    assert "throughput-optimised" in served.text


def test_headers_stand_once(served: Server) -> None:
    """Ray Serve's request id and ours don't both appear."""
    response = served.ask("alpha")
    assert len(response.headers.get_list("x-request-id")) == 1
    assert int(response.headers["openai-processing-ms"]) >= 1


def test_errors_cross_the_hop(served: Server) -> None:
    """An engine's refusals keep their status and meaning: 429 with times, 400 with the code."""
    for stream in (False, True):
        full = served.ask("busy", stream=stream)
        assert full.status_code == 429
        assert full.json()["error"]["code"] == "overloaded"
        assert int(full.headers["retry-after"]) >= 1
        long = served.ask("alpha", max_tokens=10_000, stream=stream)
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_plans_span_engines(served: Server) -> None:
    """A cascade whose first stage is refused goes on to another engine, and says so."""
    plan = {"cascade": {"stages": ["busy", "alpha"], "thresholds": [0.5]}}
    shoal = served.ask("auto", shoal={"plan": plan, "explain": True}).json()["shoal"]
    assert [stage["outcome"] for stage in shoal["stages"]] == ["ok", "failed", "ok"]
    assert shoal["members"] == ["alpha"]


def test_every_replica_takes_up_new_policies(served: Server, pool: Any) -> None:
    """Reloaded over HTTP or by SIGHUP, every ingress replica answers by them, without a restart."""

    def answers(policy: str) -> bool:
        return all(served.ask(f"policy/{policy}").status_code == 200 for _ in range(8))

    for number, policy in enumerate(("first", "second"), 2):
        assert served.ask(f"policy/{policy}").status_code == 404
        write_pool(served.folder, policies={policy: {"kind": "fixed", "plan": "alpha"}}, **pool)
        with served.http as http:
            if policy == "first":
                assert http.post("/v1/admin/reload").json()["number"] == number
            else:
                served.process.send_signal(signal.SIGHUP)
        until(lambda policy=policy: answers(policy))
        with served.http as http:
            assert http.get("/v1/admin/edition").json()["number"] == number
    assert served.ask("policy/first").status_code == 404, "it is no more"
    rows = open_database(f"sqlite:///{served.folder}/rows.db")
    query = sa.select(REQUESTS.c.edition).where(REQUESTS.c.status == 200).distinct()

    def answered_by() -> set[int]:
        with rows.connect() as connection:
            return set(connection.execute(query).scalars())

    until(lambda: answered_by() >= {2, 3})
    rows.dispose()


def test_ports_are_those_that_the_documentation_lists(served: Server) -> None:
    """Who listens, and who of them to others than this machine, stands in docs/operations.md."""
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    table = text.partition("| who listens | where |")[2].partition("\n\n")[0]
    rows = {tuple(map(str.strip, line.split("|")[1:3])) for line in table.splitlines()[2:]}
    found = listening(served)
    assert found <= rows
    assert {who for who, where in found if where != "loopback"} == {
        who for who, where in rows if where != "loopback"
    }


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_lane(served: Server, stream: bool) -> None:
    """The client's disconnect reaches the engine's replica through every proxy."""
    data = json.dumps(
        {"model": "beta", "stream": stream, "messages": [{"role": "user", "content": "x"}]}
    ).encode()
    connection = socket.create_connection(("127.0.0.1", served.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    until(lambda: served.engines()["one"]["active_lanes"] == 1)
    connection.close()
    until(lambda: served.engines()["one"]["active_lanes"] == 0)


def test_another_servers_models_need_no_process(served: Server) -> None:
    """Every ingress replica asks for itself; each tells of what all of them ask."""
    assert not served.family("engine-far")
    with ThreadPoolExecutor(6) as threads, ExitStack() as connections:
        # New connections, so that HAProxy deals them out to both replicas.
        clients = [connections.enter_context(served.http) for _ in range(6)]
        body = {"model": "distant", "stream": True, "messages": [{"role": "user", "content": "x"}]}
        path = "/v1/chat/completions"
        streams = [client.stream("POST", path, json=body, timeout=60) for client in clients]
        opened = list(threads.map(connections.enter_context, streams))
        assert {one.status_code for one in opened} == {200}
        for _ in range(6):
            assert served.engines()["far"]["running_requests"] == len(opened)
    until(lambda: served.engines()["far"]["running_requests"] == 0)


def test_a_killed_engine_fails_over_and_comes_back(served: Server) -> None:
    """Mid-answer: 503 for its own request, the next stage for a cascade; then it is replaced."""
    plan = {"cascade": {"stages": ["gamma", "alpha"], "thresholds": [0.0]}}
    with ThreadPoolExecutor() as threads:
        alone = threads.submit(served.ask, "gamma")
        covered = threads.submit(served.ask, "auto", shoal={"plan": plan})
        until(lambda: served.engines()["two"]["active_lanes"] == 2)
        replicas = served.family("ray::ServeReplica:shoal:engine-two")
        assert replicas
        for replica in replicas:
            replica.kill()
        failed = alone.result()
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_failed")
        answer = covered.result().json()
        assert answer["choices"][0]["message"]["content"] == "hello"
        assert answer["shoal"]["members"] == ["alpha"]
    until(lambda: served.ask("full").status_code == 200)


def test_stops_everything_it_started(served: Server, tmp_path_factory: Any) -> None:
    """Ctrl-C in the terminal ends the command with 0 and leaves no process of Ray's (runs last)."""
    family = served.family()
    assert len(family) > 4
    os.killpg(served.process.pid, signal.SIGINT)
    assert served.process.wait(180) == 0
    until(lambda: served.text.splitlines()[-1] == "Stopped.")
    until(lambda: not any(map(runs, family)))
    with pytest.raises(httpx.ConnectError):
        served.ask("alpha")
