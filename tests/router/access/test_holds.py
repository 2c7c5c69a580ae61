"""What running requests hold of a budget, when replicas, clients or the database fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from random import Random
from threading import Event
from typing import Any

import pytest
import sqlalchemy as sa

from router.access.limits import NOTHING, BudgetExhausted, BudgetUnavailable
from router.ledger.database import Database, writing
from router.ledger.schema import BUDGET_HOLDS, BUDGET_WINDOWS
from router.ledger.writer import Ledger
from tests.clock import Clock, until
from tests.router.access.budgeting import NOW_S, NewBudgets, spent, tokens
from tests.router.ledger.records import record


async def test_a_client_that_leaves_while_waiting_holds_nothing(
    database: Database, new_budgets: NewBudgets
) -> None:
    """Cancelling a reservation at any moment gives back whatever was decided meanwhile."""
    budgets = new_budgets(server={"tokens_per_day": 1000}, wait_s=60)
    random = Random(5)

    async def leaving(number: int) -> None:
        task = asyncio.create_task(
            budgets.reserve(request_id=f"r{number}", key=None, estimate=tokens(400))
        )
        await asyncio.sleep(random.random() * 0.05)
        task.cancel()
        with suppress(asyncio.CancelledError):
            budgets.settle(await task, NOTHING)

    await asyncio.gather(*(leaving(number) for number in range(60)))
    await budgets.close()
    assert spent(database) == (0, 0)
    with database.connect() as connection:
        assert connection.execute(sa.select(BUDGET_HOLDS)).all() == []


async def test_a_dead_replicas_holds_come_back(
    database: Database, new_budgets: NewBudgets, clock: Clock, new_ledger: Callable[..., Ledger]
) -> None:
    """After the lease, what the ledger has of a dead replica's requests is charged, once."""
    # So long a lease that the dead replica, whose thread lives on, renews nothing.
    lease_s = 3600
    dead, alive = (
        new_budgets(server={"tokens_per_day": 100}, lease_s=lease_s, wait_s=60) for _ in range(2)
    )
    ledger = new_ledger()

    for name in ("req-1", "req-2", "req-3"):
        await dead.reserve(request_id=name, key=None, estimate=tokens(30))
    ledger.record(record(1, time_s=NOW_S, prompt_tokens=10, output_tokens=5))
    await ledger.flush()
    assert spent(database) == (0, 90)
    clock.now_s += lease_s + 1
    # It waits for the next sweep.
    reservation = await alive.reserve(request_id="b", key=None, estimate=tokens(80))
    assert spent(database) == (15, 80)
    alive.settle(reservation, tokens(80))
    await alive.close()
    # It was only slow: its request is charged late, and the others count once.
    dead.settle(
        reservation.__class__(request_id="req-2", windows=reservation.windows, headers={}),
        tokens(4),
    )
    dead.settle(
        reservation.__class__(request_id="req-1", windows=reservation.windows, headers={}),
        tokens(9),
    )
    await dead.close()
    assert spent(database) == (15 + 80 + 4, 0)


async def test_a_living_replicas_holds_are_renewed(
    database: Database, new_budgets: NewBudgets, clock: Clock
) -> None:
    """A long stream keeps what it holds well past one lease."""
    lease_s = 1.2
    budgets, other = (
        new_budgets(server={"tokens_per_day": 100}, lease_s=lease_s, wait_s=0) for _ in range(2)
    )

    def expires_s() -> float:
        with database.connect() as connection:
            return float(connection.execute(sa.select(BUDGET_HOLDS.c.expires_s)).scalar_one())

    await budgets.reserve(request_id="a", key=None, estimate=tokens(90))
    for number in range(5):
        clock.now_s += lease_s / 2
        # Time stands still until the renewal is seen: a slow machine must not end a lease.
        await until(lambda: expires_s() >= clock.now_s + lease_s)
        with pytest.raises(BudgetExhausted):
            await other.reserve(request_id=f"b{number}", key=None, estimate=tokens(50))


async def test_a_replica_that_was_held_up_keeps_its_own_holds(
    database: Database, new_budgets: NewBudgets, clock: Clock
) -> None:
    """Whose lease is over because the machine stood still renews it, and gives nothing back."""
    lease_s = 3.0
    budgets = new_budgets(server={"tokens_per_day": 100}, lease_s=lease_s)

    def hold() -> sa.Row[tuple[bool, float]]:
        columns = BUDGET_HOLDS.c
        with database.connect() as connection:
            return connection.execute(sa.select(columns.lapsed, columns.expires_s)).one()

    await budgets.reserve(request_id="a", key=None, estimate=tokens(90))
    clock.now_s += 2 * lease_s
    await until(lambda: hold().lapsed or hold().expires_s == clock.now_s + lease_s)
    assert not hold().lapsed


async def test_without_the_database_capped_requests_are_refused(
    database: Database, new_budgets: NewBudgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that fails refuses requests at once, and settlements are kept until it works."""
    budgets = new_budgets(server={"tokens_per_day": 100})
    tried: list[object] = []

    def broken(*args: object) -> None:
        tried.append(args)
        raise sa.exc.OperationalError("select", {}, Exception("down"))

    first = await budgets.reserve(request_id="a", key=None, estimate=tokens(50))
    with monkeypatch.context() as patch:
        patch.setattr(budgets._store, "apply", broken)
        with pytest.raises(BudgetUnavailable):
            await budgets.reserve(request_id="b", key=None, estimate=tokens(1))
        refused = len(tried)
        budgets.settle(first, tokens(7))
        await until(lambda: len(tried) > refused)
        assert spent(database) == (0, 50)
    await until(lambda: spent(database) == (7, 0))


async def test_a_commit_that_nobody_saw_end_holds_nothing(
    database: Database, new_budgets: NewBudgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reservation that was refused for want of an answer is undone, though it was committed."""
    budgets = new_budgets(server={"tokens_per_day": 100}, wait_s=60)
    apply, committed = budgets._store.apply, []

    def cut(*args: Any) -> None:
        apply(*args)
        committed.append(spent(database))
        raise sa.exc.OperationalError("commit", {}, Exception("the connection is lost"))

    with monkeypatch.context() as patch:
        patch.setattr(budgets._store, "apply", cut)
        with pytest.raises(BudgetUnavailable):
            await budgets.reserve(request_id="a", key=None, estimate=tokens(60))
    assert committed[0] == (0, 60)
    await until(lambda: spent(database) == (0, 0))
    await budgets.reserve(request_id="b", key=None, estimate=tokens(100))


async def test_what_cannot_be_counted_fails_alone(
    database: Database, new_budgets: NewBudgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a single end that came with it, too: one of each has no halves."""
    budgets = new_budgets(server={"tokens_per_day": 10_000}, wait_s=60)
    apply, busy, go_on = budgets._store.apply, Event(), Event()
    first = await budgets.reserve(request_id="a", key=None, estimate=tokens(60))

    def odd(settles: Any, reserves: Any, now_s: float) -> Any:
        if any(reserve.request_id == "held" for reserve in reserves):
            busy.set()
            go_on.wait(60)
        if any(reserve.amounts.tokens > 5000 for reserve in reserves):
            raise OverflowError("int too large")
        return apply(settles, reserves, now_s)

    monkeypatch.setattr(budgets._store, "apply", odd)
    held = asyncio.create_task(budgets.reserve(request_id="held", key=None, estimate=tokens(1)))
    await asyncio.to_thread(busy.wait, 60)
    budgets.settle(first, tokens(50))
    bad = asyncio.create_task(budgets.reserve(request_id="bad", key=None, estimate=tokens(6000)))
    await asyncio.sleep(0)  # it waits now
    go_on.set()
    with pytest.raises(OverflowError):
        await bad
    await held
    await until(lambda: spent(database) == (50, 1))


async def test_what_is_long_over_is_forgotten(
    database: Database, new_budgets: NewBudgets, clock: Clock
) -> None:
    """Ended windows and lapsed holds are deleted after days; open windows stay."""
    budgets = new_budgets(server={"tokens_per_minute": 100, "tokens_per_month": 1000}, lease_s=5)

    await budgets.reserve(request_id="a", key=None, estimate=tokens(5))
    store = budgets._store
    store.sweep(NOW_S + 6)
    store.forget(NOW_S + 86400)
    with database.connect() as connection:
        assert len(connection.execute(sa.select(BUDGET_WINDOWS)).all()) == 2
        assert len(connection.execute(sa.select(BUDGET_HOLDS)).all()) == 1
    store.forget(NOW_S + 3 * 86400)
    with database.connect() as connection:
        [left] = connection.execute(sa.select(BUDGET_WINDOWS)).all()
        assert connection.execute(sa.select(BUDGET_HOLDS)).all() == []
    assert "month" in left.window_id and left.held_tokens == 0
    with writing(database) as connection:
        assert connection.execute(sa.delete(BUDGET_HOLDS)).rowcount == 0


async def test_a_lost_hold_is_charged_all_the_same(
    database: Database, new_budgets: NewBudgets, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a crash of the database undid a reservation, its request still counts, and is told."""
    budgets = new_budgets(server={"tokens_per_day": 100})

    lost = await budgets.reserve(request_id="a", key=None, estimate=tokens(40))
    with writing(database) as connection:
        connection.execute(sa.delete(BUDGET_HOLDS))
        connection.execute(sa.update(BUDGET_WINDOWS).values(held_tokens=0, held_requests=0))
    budgets.settle(lost, tokens(15))
    budgets.settle(lost, tokens(15))
    await budgets.close()
    assert spent(database) == (15, 0)
    assert "a has no hold" in caplog.text
