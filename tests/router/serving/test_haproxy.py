"""Ray's HAProxy configuration, completed."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from router.bodies import address_of
from router.haproxy import (
    HEADER_TIMEOUT_S,
    complete,
    find_haproxy,
    most_connections,
    write_launcher,
)
from router.ports import free_port

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using extra keyword arguments:DeprecationWarning"  # Ray Serve's, at its first import
)


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Ray Serve itself writes, without any application."""
    from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig

    folder = tmp_path_factory.mktemp("haproxy")
    config = HAProxyConfig(
        socket_path=f"{folder}/admin.sock",
        server_state_base=str(folder),
        server_state_file=f"{folder}/server-state",
    )
    file = folder / "haproxy.cfg"
    HAProxyApi(config, config_file_path=str(file))._generate_config_file_internal()
    return file.read_text()


def test_bounds_what_clients_can_hold(configuration: str) -> None:
    """Heads have a time, addresses a share, and statistics listen on loopback only."""
    text = complete(configuration)
    assert f"timeout http-request {HEADER_TIMEOUT_S}s" in text
    assert f"sc0_conn_cur gt {most_connections() // 4}" in text
    binds = [line.split()[1] for line in text.splitlines() if line.strip().startswith("bind ")]
    public = [bind for bind in binds if not bind.startswith("127.0.0.1:")]
    assert public == [bind for bind in public if "8000" in bind]
    assert len(binds) == 3
    assert "mode 666" not in text


def test_completing_twice_adds_nothing(configuration: str) -> None:
    """A reload starts with what is complete already."""
    assert complete(complete(configuration)) == complete(configuration)


def test_haproxy_takes_it(configuration: str, tmp_path: Path) -> None:
    """The real HAProxy finds no fault with the result."""
    binary = find_haproxy()
    if binary is None:
        pytest.skip("no HAProxy is installed")
    file = tmp_path / "haproxy.cfg"
    file.write_text(complete(configuration))
    checked = subprocess.run(
        [binary, "-c", "-f", str(file)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


_SHOAL_HAPROXY = [sys.executable, "-c", "from router.haproxy import launch; launch()"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], str]]]:
    """Start what Ray starts in HAProxy's place, all with one configuration; where it listens."""
    binary = find_haproxy()
    if binary is None:
        pytest.skip("no HAProxy is installed")
    launcher, file, port = write_launcher(tmp_path, binary), tmp_path / "haproxy.cfg", free_port()

    def start(
        configuration: str, *arguments: str, by_hand: bool = False
    ) -> tuple[subprocess.Popen[bytes], str]:
        text = re.sub(r"bind :\d+", lambda _: f"bind :{free_port()}", configuration)
        file.write_text(re.sub(r"bind \S+:8000", f"bind 127.0.0.1:{port}", text))
        what = _SHOAL_HAPROXY if by_hand else [str(launcher)]
        command = [*what, "-db", "-f", str(file), *arguments]
        process = stack.enter_context(subprocess.Popen(command))
        stack.callback(process.kill)
        return process, f"http://127.0.0.1:{port}/v1/models"

    with ExitStack() as stack:
        yield start


def _get(url: str) -> httpx.Response:
    """Ask until somebody listens."""
    end = time.monotonic() + 60
    while True:
        try:
            return httpx.get(url)
        except httpx.ConnectError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_one_that_knows_no_replica_yet_is_asked_again(
    configuration: str, start: Callable[..., tuple[subprocess.Popen[bytes], str]]
) -> None:
    """Clients repeat a 503, where they would believe a 404."""
    answer = _get(start(configuration)[1])
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_new_one_takes_over_from_one_whose_manager_was_killed(
    configuration: str, start: Callable[..., tuple[subprocess.Popen[bytes], str]]
) -> None:
    """The first of a manager ends what is left; a reload names whom it replaces, and only that."""
    left, url = start(configuration)
    _get(url)
    assert os.getpgid(left.pid) != os.getpgid(0), "Ray kills a worker's whole process group"
    new, _ = start(configuration)
    assert left.wait(60) == 0
    assert _get(url).status_code == 503
    start(configuration, "-sf", "999999999")
    time.sleep(1)
    assert new.poll() is None


@contextmanager
def _telling_addresses() -> Iterator[int]:
    """Serve on a port as Ray does, telling every client where it seems to be."""

    async def tell(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(address_of(Request(scope)))(scope, receive, send)

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(tell, port=port, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()


def test_in_a_cluster_started_by_hand_it_ends_with_its_manager(
    configuration: str, start: Callable[..., tuple[subprocess.Popen[bytes], str]]
) -> None:
    """There nobody else looks after it, so it stays in the process group that Ray kills."""
    process, url = start(configuration, by_hand=True)
    assert _get(url).status_code == 503
    assert os.getpgid(process.pid) == os.getpgid(0)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("claimed", [None, "203.0.113.9", "127.0.0.1", "127.0.0.1, 203.0.113.9"])
def test_clients_are_where_they_are(
    configuration: str,
    start: Callable[..., tuple[subprocess.Popen[bytes], str]],
    claimed: str | None,
    by_hand: bool,
) -> None:
    """Who has no key is known by its address, whatever it says, and not by HAProxy's."""
    with _telling_addresses() as port:
        replica = rf"backend default_backend\n    server one 127.0.0.1:{port}\n"
        routed = re.sub(r"^backend default_backend\n.*\n", replica, configuration, flags=re.M)
        _, url = start(routed, by_hand=by_hand)
        headers = {} if claimed is None else {"x-forwarded-for": claimed}
        _get(url)
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.9")) as client:
            answer = client.get(url, headers=headers)
    assert (answer.status_code, answer.text) == (200, "127.0.0.9")
