"""A real PostgreSQL server in a folder of its own, for tests: loopback only, gone afterwards."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from router.ports import free_port


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, its data, and how it is started again."""

    address: str
    folder: Path
    start: Callable[[], None]

    def processes(self) -> list[psutil.Process]:
        """Return its processes: the main one, and a child per connection among others."""
        main = psutil.Process(int((self.folder / "postmaster.pid").read_text().split()[0]))
        return [main, *main.children(recursive=True)]


@contextmanager
def postgresql() -> Iterator[Server]:
    """Yield a fresh server; skips where there is none to start."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (the extra 'postgres')")
    # The server refuses to run as root, so root hands its folder to the package's own user.
    prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    as_user = prefix if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="shoal-pg-"))
    if as_user:
        shutil.chown(folder, "postgres", "postgres")
    port = free_port()

    def run(binary: str, *arguments: str | Path) -> None:
        command = [*as_user, binaries / binary, "-D", folder / "data", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

    try:
        run("initdb", "-U", "shoal", "-A", "trust", "--no-sync", "-E", "UTF8")
        options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off"

        def start() -> None:
            run("pg_ctl", "-w", "-t", "120", "-l", folder / "log", "-o", options, "start")

        start()
        try:
            address = f"postgresql://shoal@127.0.0.1:{port}/postgres"
            yield Server(address, folder / "data", start)
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
