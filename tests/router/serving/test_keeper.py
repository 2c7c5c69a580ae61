"""What a server started ends with it, whoever ended it, and nothing else does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from router.keeper import VARIABLE, is_running

# A server that has started two processes, one behind the other and away from its group.
SERVER = """
import subprocess, sys, time
from pathlib import Path
from router.keeper import kept
child = "import subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)"
child += "; time.sleep(600)"
with kept(Path(sys.argv[1])):
    started = subprocess.Popen(
        [sys.executable, "-c", child], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={} if sys.argv[2:] else None,
    )
    print(started.pid, started.stdout.readline().strip(), flush=True)
    sys.stdin.readline()
"""


class Server:
    """The server's process and the ids of what it started."""

    def __init__(self, folder: Path, *, nameless: bool = False) -> None:
        folder.mkdir()
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), *(["nameless"] if nameless else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != VARIABLE},
        )
        assert self.process.stdout is not None
        self.started = [int(pid) for pid in self.process.stdout.readline().split()]
        assert len(self.started) == 2

    def keeper(self) -> int:
        """Return the keeper's process id."""
        [pid] = [
            int(entry.name)
            for entry in Path("/proc").glob("[0-9]*")
            if b"keeper.py" in _cmdline(entry) and str(self.folder).encode() in _cmdline(entry)
        ]
        return pid


def _cmdline(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _ended(server: Server) -> bool:
    return not any(is_running(pid) for pid in server.started)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers, and end them after the test."""
    servers: list[Server] = []

    def start(*, nameless: bool = False) -> Server:
        servers.append(Server(tmp_path / f"server-{len(servers)}", nameless=nameless))
        return servers[-1]

    yield start
    for server in servers:
        for pid in (server.process.pid, *server.started):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        server.process.communicate()


def test_nothing_outlives_a_killed_server(start: Callable[..., Server]) -> None:
    """After kill -9 its processes end, those in other sessions too, and its folder goes."""
    server, other = start(), start()
    server.process.kill()
    _until(lambda: _ended(server))
    _until(lambda: not server.folder.exists())
    assert all(is_running(pid) for pid in other.started)
    assert other.folder.exists()


def test_who_lost_the_name_is_known_by_descent(start: Callable[..., Server]) -> None:
    """A process that overwrote what it inherited, as programs with a title do, ends as well."""
    server = start(nameless=True)
    time.sleep(3)  # for the keeper to have looked
    server.process.kill()
    _until(lambda: _ended(server))


def test_nothing_outlives_a_server_that_stops(start: Callable[..., Server]) -> None:
    """What a server forgets to end at its regular end is ended before it returns."""
    server = start()
    server.process.communicate("\n")
    assert _ended(server)
    assert not server.folder.exists()


def test_the_next_server_ends_what_server_and_keeper_left(start: Callable[..., Server]) -> None:
    """Where the keeper was killed as well, the next start cleans up, and spares who still lives."""
    lost, living = start(), start()
    os.kill(lost.keeper(), signal.SIGKILL)
    lost.process.kill()
    lost.process.wait()
    assert not _ended(lost)
    start()
    assert _ended(lost)
    assert not lost.folder.exists()
    assert all(is_running(pid) for pid in living.started)
    assert living.folder.exists()


def test_a_variable_of_that_name_alone_is_no_reason(start: Callable[..., Server]) -> None:
    """Somebody else's process that happens to have the variable is left alone."""
    values = ("https://example.org", "1:2", "1:2:3", "999999999:1:1")
    others = [
        subprocess.Popen(["sleep", "600"], env={**os.environ, VARIABLE: value}) for value in values
    ]
    try:
        start()
        assert all(is_running(other.pid) for other in others)
    finally:
        for other in others:
            other.kill()
            other.wait()
