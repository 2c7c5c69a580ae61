"""Ray's HAProxy configuration, completed."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from router.haproxy import (
    HEADER_TIMEOUT_S,
    complete,
    find_haproxy,
    most_connections,
    stand_in,
    write_launcher,
)
from tests.ports import free_port

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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], str]]]:
    """Start what Ray starts in HAProxy's place, all with one configuration; where it listens."""
    binary = find_haproxy()
    if binary is None:
        pytest.skip("no HAProxy is installed")
    launcher, file, port = write_launcher(tmp_path, binary), tmp_path / "haproxy.cfg", free_port()

    def start(configuration: str, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
        text = re.sub(r"bind :\d+", lambda _: f"bind :{free_port()}", configuration)
        file.write_text(re.sub(r"bind \S+:8000", f"bind 127.0.0.1:{port}", text))
        command = [str(launcher), "-db", "-f", str(file), *arguments]
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


def test_one_stands_in_for_what_was_killed_until_the_next_takes_over(
    configuration: str,
    start: Callable[..., tuple[subprocess.Popen[bytes], str]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """It serves by what the last one knew, which the next manager's first knows too."""
    knowing = complete(configuration).replace("string starting", "string known")
    process, url = start(knowing)
    assert _get(url).text == "known"
    process.kill()
    process.wait()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    request.addfinalizer(lambda: [one.kill() for one in _daemons(tmp_path)])
    stand_in(tmp_path)
    assert httpx.get(url).text == "known"
    [commands] = re.findall(r"stats socket (\S+)", configuration)
    with socket.socket(socket.AF_UNIX) as line, pytest.raises(ConnectionRefusedError):
        line.connect(commands)  # where it took commands, Ray would believe that its own is there
    [standing] = _daemons(tmp_path)
    start(configuration)
    psutil.wait_procs([standing], timeout=60)
    assert not standing.is_running()
    assert _get(url).text == "known"


def _daemons(folder: Path) -> list[psutil.Process]:
    """Return the processes that serve by a file in `folder` and that nobody here started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if "-D" in command and any(word.startswith(str(folder)) for word in command):
                found.append(process)
    return found
