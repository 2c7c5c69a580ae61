"""Ends what a server leaves behind: its processes go when it goes, whoever ended it, and how.

Every process that a server starts, or that these start, inherits a variable that names the server.
A keeper, a small process beside the server, waits for its end (also by `kill -9`) and then ends all
that carry the name, and all that it has seen below the server (a program that sets its own title,
as Ray's do, loses what it inherited). Where the keeper was killed too, the next server ends those
with the name when it starts. Only processes whose server is provably gone are touched: the name
holds its process id, that process's start and its namespace. It knows nothing of Ray, HAProxy or
models.

Run as a program: `python keeper.py NAME [FOLDER]` (its standard input is the server's pipe).
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

VARIABLE: Final = "SHOAL_SERVER"
_OWNER: Final = ".server"  # the file of a server's folder that holds its name
_PROC: Final = Path("/proc")
_LISTEN: Final = "0A"  # TCP_LISTEN in /proc/net/tcp
_LOOK_S: Final = 1.0  # how often the keeper looks who is there
_SWEEP_S: Final = 5.0  # a killed process is gone at once, unless the disk holds it


@contextlib.contextmanager
def kept(folder: Path | None = None) -> Iterator[None]:
    """Keep this process's children, and `folder`, from outliving it or the block.

    What earlier servers of this user left, beside `folder` too, is ended first. Does nothing where
    there is no /proc.
    """
    if not (_PROC / "self" / "environ").exists():
        yield
        return
    for name in {name for _, name in _named() if _is_gone(name)}:
        sweep(name)
    name = _name_of(os.getpid())
    if folder is not None:
        for left in folder.parent.glob(f"*/{_OWNER}"):
            with contextlib.suppress(OSError):
                mine = left.is_file() and left.stat().st_uid == os.getuid()
                if mine and _is_gone(left.read_text()):
                    shutil.rmtree(left.parent)
        (folder / _OWNER).write_text(name)
    os.environ[VARIABLE] = name
    command = [sys.executable, __file__, name, *([str(folder)] if folder else [])]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        assert keeper.stdin is not None
        keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.wait(2 * _SWEEP_S)


def sweep(name: str) -> None:
    """Kill all processes of the server called `name`, itself and the caller left out."""
    end_s = time.monotonic() + _SWEEP_S
    while time.monotonic() < end_s:
        found = [pid for pid, owner in _named() if owner == name and pid != os.getpid()]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process has this id, and is more than the entry of one that ended."""
    return (_stat(pid) or "Z")[0] != "Z"


def children() -> dict[int, str]:
    """Return the running children of this process, and the names of their programs."""
    found = {}
    for entry in _PROC.glob("[0-9]*"):
        stat = _stat(int(entry.name))
        if stat is not None and stat[0] != "Z" and int(stat[1]) == os.getpid():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = (entry / "comm").read_text().strip()
    return found


def wide_ports() -> dict[int, str]:
    """Return the TCP ports on which the server's processes listen for all, and their programs."""
    listening = {}  # socket -> port
    for table, nowhere in (("tcp", "0" * 8), ("tcp6", "0" * 32)):
        for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
            local, _, state, *_, inode = line.split()[1:10]
            address, _, digits = local.partition(":")
            if state == _LISTEN and address == nowhere:
                listening[f"socket:[{inode}]"] = int(digits, 16)
    ports: dict[int, str] = {}
    for pid in [pid for pid, name in _named() if name == os.environ.get(VARIABLE)]:
        with contextlib.suppress(OSError):
            program = (_PROC / str(pid) / "comm").read_text().strip()
            for descriptor in (_PROC / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    port = listening.get(str(descriptor.readlink()))
                    if port is not None:
                        ports[port] = program
    return ports


def _named() -> Iterator[tuple[int, str]]:
    """Yield the running processes that carry a server's name: their ids, and that name.

    Those of other users, and of other namespaces (a container's), are not seen.
    """
    key, here = f"{VARIABLE}=".encode(), _namespace("self")
    for entry in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if _namespace(entry.name) != here or not is_running(int(entry.name)):
                continue
            for variable in (entry / "environ").read_bytes().split(b"\0"):
                if variable.startswith(key):
                    yield int(entry.name), variable[len(key) :].decode(errors="replace")


def _namespace(pid: str) -> int:
    return (_PROC / pid / "ns" / "pid").stat().st_ino


def _name_of(pid: int) -> str:
    """Return the name of the server in process `pid`; no two, ever, share one on a machine."""
    stat = _stat(pid)
    return f"{pid}:{stat[19] if stat else 0}:{_namespace('self')}"


def _is_gone(name: str) -> bool:
    """Whether `name` is a server's of this namespace, and that server has ended."""
    match = re.fullmatch(rf"(\d+):\d+:{_namespace('self')}", name)
    if match is None:
        return False
    pid = int(match[1])
    return not is_running(pid) or _name_of(pid) != name


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None if there is no such process."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _below(family: dict[int, str]) -> dict[int, str]:
    """Return `family`, processes and when each started, with the running ones that it started."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for entry in _PROC.glob("[0-9]*"):
        stat = _stat(int(entry.name))
        if stat is not None and stat[0] != "Z":
            parents.setdefault(int(stat[1]), []).append((int(entry.name), stat[19]))
    found, fresh = dict(family), list(family)
    while fresh:
        started = [
            child for pid in fresh for child in parents.get(pid, []) if child[0] not in found
        ]
        found.update(started)
        fresh = [pid for pid, _ in started]
    return found


def main() -> None:
    """Wait until the server is gone, then end its processes and remove its folder."""
    name, *folders = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the server decides when, a terminal does not
    server, started = name.split(":")[:2]
    family = {int(server): started}
    while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
        running = {pid: at for pid, at in family.items() if (_stat(pid) or [""] * 20)[19] == at}
        family = _below(running)
    for pid, at in family.items():
        mine = pid in (int(server), os.getpid())
        if not mine and (_stat(pid) or [""] * 20)[19] == at:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    sweep(name)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
