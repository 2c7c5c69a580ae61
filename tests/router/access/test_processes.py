"""Budgets over four processes that are killed, on both databases: what they say is judged after.

Each writes what a request used just before it settles that. `test_history` draws the histories.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
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


def _end_leases(database: Database, killed: Sequence[Replica]) -> None:
    """As if they had run out. Again and again: PostgreSQL may still be at a last commit."""
    theirs = BUDGET_HOLDS.c.holder.in_([replica.name for replica in killed])
    with writing(database) as connection:
        connection.execute(sa.update(BUDGET_HOLDS).where(theirs).values(expires_s=0.0))


@pytest.mark.parametrize("num_kills", [1, pytest.param(8, marks=pytest.mark.faults)])
def test_a_cap_holds_over_four_processes_that_are_killed(
    ledger_url: str, database: Database, num_kills: int
) -> None:
    """200 clients in four processes spend 99% to 100% of a cap; a SIGKILL doubles nothing."""
    store = BudgetStore(database, holder="test", lease_s=LEASE_S)
    # Until the test gives back half of the cap, nobody comes to its end.
    cap = limits(SERVER, read_caps({"tokens_per_month": CAP_TOKENS}, "test"), time.time())
    half = Amounts.of(requests=0, tokens=CAP_TOKENS // 2, cost=Cost())
    store.apply([], [Reserve(request_id="half", amounts=half, limits=cap)], time.time())
    living = [Replica(ledger_url, f"replica-{number}") for number in range(4)]
    killed: list[Replica] = []
    deadline_s = time.monotonic() + 120 * num_kills
    for kill in range(num_kills):
        share = CAP_TOKENS / 3 * (kill + 1) / num_kills
        while sum(sum(replica.used.values()) for replica in [*living, *killed]) < share:
            assert time.monotonic() < deadline_s
            _end_leases(database, killed)
            time.sleep(0.05)
        # Of the processes that have started, the one that has spent most; another takes its place.
        victim = max(living, key=lambda replica: len(replica.used))
        living.remove(victim)
        victim.process.kill()
        assert victim.wait() == -9
        killed.append(victim)
        if kill + 1 < num_kills:
            living.append(Replica(ledger_url, f"replica-{4 + kill}"))
    store.apply([Settle(request_id="half", used=NOTHING)], [], time.time())
    deadline_s = time.monotonic() + 200
    while any(replica.process.poll() is None for replica in living):
        assert time.monotonic() < deadline_s
        _end_leases(database, killed)
        time.sleep(0.1)
    assert [replica.wait() for replica in living] == [0, 0, 0]

    store.sweep(time.time() + 2 * LEASE_S)  # what nobody needed to find
    with database.connect() as connection:
        [window] = connection.execute(sa.select(BUDGET_WINDOWS)).mappings()
        held = connection.execute(sa.select(BUDGET_HOLDS).where(~BUDGET_HOLDS.c.lapsed)).all()
    assert held == []
    assert window["held_tokens"] == window["held_requests"] == 0
    spent = window["spent_tokens"]
    assert 0.99 * CAP_TOKENS <= spent <= CAP_TOKENS

    rows = {row["request_id"]: row["output_tokens"] for row in requests(database)}
    settled = {name: used for replica in living for name, used in replica.used.items()}
    unsure = {name: used for replica in killed for name, used in replica.used.items()}
    assert settled and unsure
    assert settled.items() <= rows.items()
    # Of the killed ones everything in the ledger was charged, and nothing that they did not use.
    in_ledger = sum(rows[name] for name in unsure if name in rows)
    charged_of_killed = spent - sum(settled.values())
    assert in_ledger <= charged_of_killed <= sum(unsure.values())
