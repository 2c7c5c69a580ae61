"""`make test-faults`: kill, stop and starve every part of a server on Ray while clients run.

Clients repeat what fails, as OpenAI's do. Whoever starts the server starts it again where it ended.
The table that this prints stands in docs/operations.md.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import psutil
import pytest

from tests.faults.clients import NUM_CLIENTS, Clients, Try, read_books
from tests.faults.kept import LEASE_S, Kept, wait_for_end
from tests.faults.network import Network, own_network
from tests.router.ledger.pgserver import postgresql
from tests.server import until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

AWAY_S = 3.0
# Rows are written `flush_interval_s` (0.2) after their answers; a busy disk takes some more.
FLUSHED_S = 2.0
COLUMNS = (
    "fault", "requests", "repeated", "failed", "rows lost", "charged without a row",
    "charged twice", "longest wait, s", "ended, s", "whole again, s",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done to a server, and what may follow."""

    inject: Callable[[Kept], None]
    ends: bool = False  # the server ends, and with it all its processes
    kills_writers: bool = False  # what they wrote in the last flush interval is lost


def _kill(kind: str, *, every: bool = False) -> Callable[[Kept], None]:
    def inject(kept: Kept) -> None:
        for process in kept.part(kind)[: None if every else 1]:
            process.kill()

    return inject


def _stop(kind: str) -> Callable[[Kept], None]:
    def inject(kept: Kept) -> None:
        with _standing_still(kept.part(kind)[:1]):
            time.sleep(AWAY_S)

    return inject


def _stop_for_good(kind: str) -> Callable[[Kept], None]:
    return lambda kept: kept.part(kind)[0].suspend()


@contextlib.contextmanager
def _standing_still(processes: list[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.suspend()
    yield
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _stop_server(kept: Kept) -> None:
    with _standing_still([psutil.Process(kept.server.process.pid)]):
        time.sleep(AWAY_S)


def _kill_keeper_and_server(kept: Kept) -> None:
    _kill("keeper")(kept)
    kept.server.process.kill()
    kept.server.process.wait()


def _lock_database(kept: Kept) -> None:
    connection = sqlite3.connect(kept.folder / "rows.db", timeout=30, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(AWAY_S)
    connection.execute("ROLLBACK")
    connection.close()


def _fill_disk(kept: Kept) -> None:
    """No file of the replicas may grow: what a full disk is to SQLite."""
    replicas = kept.part("ingress replica")
    for process in replicas:
        process.rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))
    time.sleep(AWAY_S)
    for process in replicas:
        process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))


def _move_clock(ahead_s: float) -> Callable[[Kept], None]:
    def inject(kept: Kept) -> None:
        kept.set_clock(ahead_s)
        time.sleep(AWAY_S)
        kept.set_clock(0)

    return inject


def _kill_postgresql(kept: Kept) -> None:
    assert kept.postgresql is not None
    for process in kept.postgresql.processes():
        process.kill()
    time.sleep(AWAY_S)
    kept.postgresql.start()


def _stop_postgresql(kept: Kept) -> None:
    assert kept.postgresql is not None
    with _standing_still(kept.postgresql.processes()):
        time.sleep(AWAY_S)


def _cut(half: str) -> Callable[[Kept], None]:
    """Cut what HAProxy sends "to" an ingress replica, or what it gets "from" it."""

    def inject(kept: Kept) -> None:
        if kept.network is None:
            pytest.skip("a network of its own needs root on Linux")
        listening = {
            connection.laddr.port
            for replica in kept.part("ingress replica")
            for connection in replica.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        [haproxy] = kept.part("HAProxy")
        remote = {c.raddr.port for c in haproxy.net_connections() if c.raddr}
        with kept.network.cut(half, min(remote & listening)):
            time.sleep(AWAY_S)

    return inject


FAULTS = {
    **{
        f"SIGSTOP of {kind}, {AWAY_S:g} s": Fault(inject=_stop(kind))
        for kind in (
            "GCS", "raylet", "Serve's controller", "HAProxy's manager", "HAProxy",
            "engine replica", "ingress replica",
        )
    },
    f"SIGSTOP of shoal serve, {AWAY_S:g} s": Fault(inject=_stop_server),
    **{
        f"SIGSTOP of {kind}, for good": Fault(
            inject=_stop_for_good(kind), kills_writers=kind == "ingress replica"
        )
        for kind in ("HAProxy", "engine replica", "ingress replica")
    },
    **{
        f"kill -9 of {kind}": Fault(inject=_kill(kind), kills_writers=kind == "ingress replica")
        for kind in (
            "Serve's controller", "HAProxy's manager", "HAProxy",
            "engine replica", "ingress replica",
        )
    },
    "kill -9 of every engine replica": Fault(inject=_kill("engine replica", every=True)),
    "kill -9 of every ingress replica": Fault(
        inject=_kill("ingress replica", every=True), kills_writers=True
    ),
    **{
        f"network {half} an ingress replica cut, {AWAY_S:g} s": Fault(inject=_cut(half))
        for half in ("to", "from")
    },
    f"clock half an hour ahead, {AWAY_S:g} s": Fault(inject=_move_clock(1800)),
    f"clock half an hour back, {AWAY_S:g} s": Fault(inject=_move_clock(-1800)),
    f"no disk space, {AWAY_S:g} s": Fault(inject=_fill_disk),
    f"database locked, {AWAY_S:g} s": Fault(inject=_lock_database),
    "SIGTERM of shoal serve": Fault(
        inject=lambda kept: kept.server.process.send_signal(signal.SIGTERM), ends=True
    ),
    "kill -9 of shoal serve": Fault(
        inject=lambda kept: kept.server.process.kill(), ends=True, kills_writers=True
    ),
    "kill -9 of keeper and shoal serve": Fault(inject=_kill_keeper_and_server, kills_writers=True),
    "kill -9 of GCS": Fault(inject=_kill("GCS"), ends=True, kills_writers=True),
    "kill -9 of raylet": Fault(inject=_kill("raylet"), ends=True, kills_writers=True),
}  # fmt: skip
FAULTS_OF_POSTGRESQL = {
    f"kill -9 of PostgreSQL, back after {AWAY_S:g} s": Fault(inject=_kill_postgresql),
    f"SIGSTOP of PostgreSQL, {AWAY_S:g} s": Fault(inject=_stop_postgresql),
}


@pytest.fixture(scope="module")
def network() -> Iterator[Network | None]:
    """A network of this module's own, so that a part of it can be cut; None: not allowed here."""
    with own_network() as network:
        yield network


@pytest.fixture(scope="module")
def serve(
    tmp_path_factory: pytest.TempPathFactory, network: Network | None
) -> Iterator[Callable[[str], Kept]]:
    """Return the running server with this kind of database; one at a time."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Kept] = {}

        def serve(kind: str) -> Kept:
            if kind not in running:
                stack.close()
                database = stack.enter_context(postgresql()) if kind == "postgresql" else None
                running.clear()
                running[kind] = Kept(tmp_path_factory.mktemp(kind), network, database)
                stack.callback(running[kind].close)
            return running[kind]

        sys.stderr.write(f"\n| {' | '.join(COLUMNS)} |\n|---{'|---' * (len(COLUMNS) - 1)}|\n")
        yield serve


@pytest.mark.parametrize(
    ("database", "name"),
    [("sqlite", name) for name in FAULTS] + [("postgresql", name) for name in FAULTS_OF_POSTGRESQL],
)
def test_a_part_may_fail(
    serve: Callable[[str], Kept], database: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every request is answered in the end, none is charged twice, no older row is lost."""
    fault = {**FAULTS, **FAULTS_OF_POSTGRESQL}[name]
    kept = serve(database)
    kept.make_whole()
    before = read_books(kept.database, LEASE_S)
    family = kept.server.family()
    clients = Clients(kept.server.url, re.sub(r"\W+", "-", name))
    try:
        until(lambda: clients.num_answered(0) >= NUM_CLIENTS)
        fault_s = time.monotonic()
        fault.inject(kept)
        ended = f"{wait_for_end(kept, family):.1f}" if fault.ends else "–"
        kept.make_whole()
        whole_s = time.monotonic()
        until(lambda: clients.num_answered(whole_s) >= 2 * NUM_CLIENTS, 300)
    finally:
        clients.close()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
    tries = clients.tries()
    with contextlib.suppress(AssertionError):  # what is still missing then is lost
        until(lambda: not _lost(read_books(kept.database, LEASE_S).rows, tries), 10)
    after = read_books(kept.database, LEASE_S)
    lost = _lost(after.rows, tries)
    num_charged = after.num_charged - before.num_charged
    num_rows = after.rows.total() - before.rows.total()
    # Of a try without a row nobody knows whether it was charged, if it ran when its server died.
    unknown = [
        one for one in tries
        if one.id not in after.rows and one.ended_s > fault_s - FLUSHED_S and one.sent_s < whole_s
    ]  # fmt: skip
    twice = num_charged - num_rows - (len(unknown) if fault.kills_writers else 0)
    failed = sum(asked.answered_s is None for asked in clients.asked)
    numbers = (
        len(clients.asked), sum(len(asked.tries) > 1 for asked in clients.asked), failed, len(lost),
        max(0, num_charged - num_rows) if fault.kills_writers else 0, max(0, twice),
    )  # fmt: skip
    times = f"{clients.longest_s(fault_s):.1f} | {ended} | {whole_s - fault_s:.1f}"
    with capsys.disabled():
        sys.stderr.write(f"| {name} | {' | '.join(map(str, numbers))} | {times} |\n")
    assert failed == 0
    assert max(after.rows.values()) == 1, "a try was answered twice"
    assert twice <= 0, "charged without having run"
    assert num_charged >= num_rows, "a row was never charged"
    assert not lost or fault.kills_writers
    assert all(one.ended_s > fault_s - FLUSHED_S for one in lost), "a row that was written is gone"


def _lost(rows: Collection[str], tries: list[Try]) -> list[Try]:
    """Return the tries that were answered and have no row."""
    return [one for one in tries if one.answered and one.id not in rows]
