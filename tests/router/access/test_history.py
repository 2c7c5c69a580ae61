"""Caps over four replicas that die, stand still and come back: any history of theirs, judged.

In the way of Jepsen: the history is drawn, every step of it goes to the real database as the
replicas' threads would send it, and a model that knows only what happened says what must stand
there. `test_processes` does the same with processes, whose order nobody draws.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from router.access.limits import NOTHING, SERVER, Amounts, limits, read_caps
from router.access.store import BudgetStore, Reserve, Settle
from router.ledger.database import Database, writing
from router.ledger.schema import BUDGET_HOLDS, BUDGET_WINDOWS, REQUESTS
from tests.router.ledger.records import keep, record

NOW_S = 1_800_000_000.0
CAP_TOKENS = 1000
LEASE_S = 10.0
SKEW_S = 2.0  # of the replicas' clocks: a fraction of the lease, as is asked of them
LIMITS = limits(SERVER, read_caps({"tokens_per_month": CAP_TOKENS}, "test"), NOW_S)
WINDOWS = tuple(limit.window.id for limit in LIMITS)
REPLICAS = st.integers(0, 3)


@dataclass
class Running:
    """A request that was admitted: who runs it, what it holds until when, and what it used."""

    replica: int
    tokens: int
    expires_s: float
    used: int | None = None  # once its row is written
    lapsed: bool = False
    alive: bool = True


class History(RuleBasedStateMachine):
    """Four replicas on one database; `charged` is what each request must have been charged."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        with writing(database) as connection:
            for table in (BUDGET_HOLDS, BUDGET_WINDOWS, REQUESTS):
                connection.execute(sa.delete(table))
        self.now_s = NOW_S
        self.num_replicas = 0
        self.stores = [self._new_replica() for _ in range(4)]
        self.running: dict[str, Running] = {}
        self.charged: dict[str, int] = {}
        self.late_tokens = 0  # charged after their hold was given back, so possibly above the cap
        self.num_requests = 0

    @rule(replica=REPLICAS, tokens=st.integers(1, 400), heard=st.booleans())
    def reserve(self, replica: int, tokens: int, heard: bool) -> None:
        """A request comes; it is refused where it does not fit, and undone where nobody waits."""
        self.num_requests += 1
        name = f"r{self.num_requests}"
        taken = sum(self.charged.values()) + self._held()
        reserve = Reserve(request_id=name, amounts=Amounts(1, tokens), limits=LIMITS)
        [admission], _ = self.stores[replica].apply([], [reserve], self.now_s)
        assert (admission.shortage is None) == (taken + tokens <= CAP_TOKENS)
        if admission.shortage is not None:
            return
        if heard:
            self.running[name] = Running(replica, tokens, self.now_s + LEASE_S)
        else:
            self.stores[replica].apply([Settle(request_id=name, used=NOTHING)], [], self.now_s)

    @precondition(lambda self: self._alive())
    @rule(data=st.data())
    def write_row(self, data: st.DataObject) -> None:
        """A request ends, and its row reaches the ledger before its settlement does."""
        name = data.draw(st.sampled_from(self._alive()))
        self._write_row(name, data.draw(st.integers(1, self.running[name].tokens)))

    @precondition(lambda self: self._alive())
    @rule(data=st.data(), resent=st.booleans(), row_first=st.booleans())
    def settle(self, data: st.DataObject, resent: bool, row_first: bool) -> None:
        """A request is settled; `resent` where the database's answer to that was lost."""
        name = data.draw(st.sampled_from(self._alive()))
        one = self.running[name]
        if row_first and one.used is None:
            self._write_row(name, data.draw(st.integers(1, one.tokens)))
        used = one.used or data.draw(st.integers(1, one.tokens))
        first = Settle(request_id=name, used=Amounts(1, used), windows=WINDOWS)
        again = Settle(request_id=name, used=Amounts(1, used), windows=WINDOWS, again=True)
        for settle in [first, again] if resent else [first]:
            self.stores[one.replica].apply([settle], [], self.now_s)
        if name not in self.charged and one.lapsed:
            self.late_tokens += used
        self.charged[name] = used
        del self.running[name]

    @rule(replica=REPLICAS)
    def kill(self, replica: int) -> None:
        """A replica dies with all it runs, and another takes its place."""
        self.stores[replica] = self._new_replica()
        for one in self.running.values():
            one.alive &= one.replica != replica

    @rule(seconds=st.integers(1, 25), renewing=st.sets(REPLICAS))
    def pass_time(self, seconds: int, renewing: set[int]) -> None:
        """Time passes; some replicas renew what they hold, others stand still."""
        for _ in range(seconds):
            self.now_s += 1
            for replica in renewing:
                self.stores[replica].renew(self.now_s)
        for one in self.running.values():
            if one.alive and not one.lapsed and one.replica in renewing:
                one.expires_s = self.now_s + LEASE_S

    @rule(replica=REPLICAS, skew_s=st.floats(-SKEW_S, SKEW_S))
    def sweep(self, replica: int, skew_s: float) -> None:
        """A replica gives back what others let expire; what the ledger knows is charged."""
        self.stores[replica].sweep(self.now_s + skew_s)
        for name, one in self.running.items():
            if not one.lapsed and one.expires_s <= self.now_s + skew_s:
                one.lapsed = True
                if one.used is not None:
                    self.charged[name] = one.used

    @invariant()
    def the_book_is_true(self) -> None:
        """Each request is charged once, what runs is held, and the cap holds."""
        spent_tokens, spent_requests, held_tokens = self._window()
        assert spent_tokens == sum(self.charged.values())
        assert spent_requests == len(self.charged)
        assert held_tokens == self._held()
        assert spent_tokens <= CAP_TOKENS + self.late_tokens

    def teardown(self) -> None:
        """When all have died, nothing is held beyond the lease."""
        for replica in range(4):
            self.kill(replica)
        self.now_s += LEASE_S
        self.sweep(0, 0.0)
        assert self._window()[2] == 0
        live = sa.select(sa.func.count()).where(~BUDGET_HOLDS.c.lapsed)
        with self.database.connect() as connection:
            assert connection.execute(live).scalar_one() == 0
        self.the_book_is_true()

    def _new_replica(self) -> BudgetStore:
        self.num_replicas += 1
        return BudgetStore(self.database, holder=f"replica-{self.num_replicas}", lease_s=LEASE_S)

    def _alive(self) -> list[str]:
        return [name for name, one in self.running.items() if one.alive]

    def _held(self) -> int:
        return sum(one.tokens for one in self.running.values() if not one.lapsed)

    def _write_row(self, name: str, used: int) -> None:
        one = self.running[name]
        one.used = one.used or used
        row = record(0, request_id=name, prompt_tokens=0, output_tokens=one.used)
        keep(self.database, [row])

    def _window(self) -> tuple[int, int, int]:
        columns = BUDGET_WINDOWS.c
        query = sa.select(columns.spent_tokens, columns.spent_requests, columns.held_tokens)
        with self.database.connect() as connection, contextlib.suppress(sa.exc.NoResultFound):
            return tuple(connection.execute(query).one())
        return 0, 0, 0


@pytest.mark.parametrize("num_histories", [20, pytest.param(200, marks=pytest.mark.faults)])
def test_any_history_of_four_replicas_is_counted_once(
    database: Database, num_histories: int
) -> None:
    """Spend never passes the cap, every settlement counts once, and no hold outlives its lease."""
    run_state_machine_as_test(
        lambda: History(database),
        settings=settings(max_examples=num_histories, stateful_step_count=30),
    )
