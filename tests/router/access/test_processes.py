"""Budgets over four processes, one of them killed, on both databases."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import sqlalchemy as sa

from policies.footprint import Cost
from router.access.limits import NOTHING, SERVER, Amounts, limits, read_caps
from router.access.store import BudgetStore, Reserve, Settle
from router.ledger.database import Database, writing
from router.ledger.queries import requests
from router.ledger.schema import BUDGET_HOLDS, BUDGET_WINDOWS
from tests.router.access.replica import LEASE_S

CAP_TOKENS = 40_000


class Replica:
    """A process that spends, and the lines it has written."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.used: dict[str, int] = {}
        script = str(Path(__file__).with_name("replica.py"))
        self.process = subprocess.Popen(
            [sys.executable, script, url, str(CAP_TOKENS), name],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                name, used = line.split()
                assert name not in self.used
                self.used[name] = int(used)

    def wait(self) -> int:
        """Return the exit code, once all is read."""
        code = self.process.wait(60)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def test_a_cap_holds_over_four_processes_one_of_them_killed(
    ledger_url: str, database: Database
) -> None:
    """200 clients in four processes spend 99% to 100% of a cap; a SIGKILL doubles nothing."""
    store = BudgetStore(database, holder="test", lease_s=LEASE_S)
    # Until the test gives back half of the cap, nobody comes to its end.
    cap = limits(SERVER, read_caps({"tokens_per_month": CAP_TOKENS}, "test"), time.time())
    half = Amounts.of(requests=0, tokens=CAP_TOKENS // 2, cost=Cost())
    store.apply([], [Reserve(request_id="half", amounts=half, limits=cap)], time.time())
    replicas = [Replica(ledger_url, f"replica-{number}") for number in range(4)]
    deadline_s = time.monotonic() + 120
    while sum(sum(replica.used.values()) for replica in replicas) < CAP_TOKENS / 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    # Of the processes that have started, the one that has spent most.
    victim = max(replicas, key=lambda replica: len(replica.used))
    replicas.insert(0, replicas.pop(replicas.index(victim)))
    victim.process.kill()
    assert victim.wait() == -9
    store.apply([Settle(request_id="half", used=NOTHING)], [], time.time())
    its = BUDGET_HOLDS.c.holder == victim.name
    deadline_s = time.monotonic() + 200
    while any(replica.process.poll() is None for replica in replicas):
        assert time.monotonic() < deadline_s
        # As if the killed one's lease had run out. PostgreSQL may still be at its last commit.
        with writing(database) as connection:
            connection.execute(sa.update(BUDGET_HOLDS).where(its).values(expires_s=0.0))
        time.sleep(0.1)
    assert [replica.wait() for replica in replicas] == [-9, 0, 0, 0]

    store.sweep(time.time() + 2 * LEASE_S)  # what nobody needed to find
    with database.connect() as connection:
        [window] = connection.execute(sa.select(BUDGET_WINDOWS)).mappings()
        live = connection.execute(sa.select(BUDGET_HOLDS).where(~BUDGET_HOLDS.c.lapsed)).all()
    assert live == []
    assert window["held_tokens"] == window["held_requests"] == 0
    spent = window["spent_tokens"]
    assert 0.99 * CAP_TOKENS <= spent <= CAP_TOKENS

    rows = {row["request_id"]: row["output_tokens"] for row in requests(database)}
    killed, *others = (replica.used for replica in replicas)
    assert killed and any(others)
    survived = sum(sum(used.values()) for used in others)
    assert {name: used for used in others for name, used in used.items()}.items() <= rows.items()
    # Of the killed one everything in the ledger was charged, and nothing that it did not use.
    in_ledger = sum(rows[name] for name in killed if name in rows)
    assert survived + in_ledger <= spent <= survived + sum(killed.values())
