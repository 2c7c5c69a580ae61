"""Budgets on real databases, with several replicas in one process."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from threading import Event
from typing import Any

import pytest
import sqlalchemy as sa

from policies.footprint import Cost
from router.access.budgets import Budgets
from router.access.keys import Key
from router.access.limits import (
    NOTHING,
    Amounts,
    BudgetExhausted,
    BudgetsConfig,
    BudgetUnavailable,
    read_caps,
    window,
)
from router.access.store import used_amounts
from router.ledger.database import Database, open_database, writing
from router.ledger.schema import BUDGET_HOLDS, BUDGET_WINDOWS
from router.ledger.writer import Ledger
from tests.router.ledger.records import record

NOW_S = 1_800_000_000.0
NewBudgets = Callable[..., Budgets]


class Clock:
    """Unix seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """A clock at a whole minute."""
    return Clock()


@pytest.fixture
def new_budgets(ledger_url: str, database: Database, clock: Clock) -> Iterator[NewBudgets]:
    """Make replicas' budgets, each with connections of its own; they are stopped afterwards."""
    made: list[Budgets] = []

    def make(**config: object) -> Budgets:
        made.append(
            Budgets(
                open_database(ledger_url),
                BudgetsConfig.model_validate(config),
                holder=f"replica-{len(made)}",
                logger=logging.getLogger("test.budgets"),
                clock=clock,
            )
        )
        return made[-1]

    yield make
    for budgets in made:
        budgets.stop()


def tokens(count: int) -> Amounts:
    """Return one request of `count` tokens."""
    return Amounts.of(tokens=count, cost=Cost())


def key(**caps: float) -> Key:
    """Return a key with caps."""
    return Key(id="key_a", name="team", prefix="sk-shoal-abcd", caps=read_caps(caps, "test"))


def spent(database: Database, scope: str = "server", period: str = "day") -> tuple[int, int]:
    """Return the tokens spent and held in the window that is open at NOW_S."""
    name = window(scope, period, NOW_S).id
    query = sa.select(BUDGET_WINDOWS).where(BUDGET_WINDOWS.c.window_id == name)
    with database.connect() as connection:
        row = connection.execute(query).one()
    return row.spent_tokens, row.held_tokens


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a replica's thread does."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the thread tells nobody
            await asyncio.sleep(0.01)


def test_requests_without_caps_touch_no_database(
    database: Database, new_budgets: NewBudgets
) -> None:
    """Where no cap applies a reservation is free, and settling it too."""
    budgets = new_budgets()

    async def run() -> None:
        reservation = await budgets.reserve(request_id="a", key=None, estimate=tokens(5))
        assert not reservation.counted and reservation.headers == {}
        budgets.settle(reservation, tokens(5))
        await budgets.close()

    statements: list[object] = []
    listening = (sa.Engine, "before_cursor_execute", lambda *args: statements.append(args))
    sa.event.listen(*listening)
    try:
        asyncio.run(run())
    finally:
        sa.event.remove(*listening)
    assert statements == []


async def test_reserve_then_settle(database: Database, new_budgets: NewBudgets) -> None:
    """The estimate is held while a request runs; what it used is charged after, to both scopes."""
    budgets = new_budgets(server={"tokens_per_day": 100, "requests_per_minute": 5})

    who = key(tokens_per_day=50)
    first = await budgets.reserve(request_id="a", key=who, estimate=tokens(40))
    assert first.headers == {
        "x-ratelimit-limit-requests": "5",
        "x-ratelimit-remaining-requests": "4",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "50",
        "x-ratelimit-remaining-tokens": "10",
        "x-ratelimit-reset-tokens": "16h0m0s",
    }
    assert spent(database) == spent(database, "key_a") == (0, 40)
    budgets.settle(first, tokens(15))
    budgets.settle(first, tokens(15))
    second = await budgets.reserve(request_id="b", key=who, estimate=tokens(35))
    budgets.settle(second, NOTHING)
    await budgets.close()
    assert spent(database) == spent(database, "key_a") == (15, 0)


async def test_an_exhausted_budget_says_which_and_until_when(
    database: Database, new_budgets: NewBudgets, clock: Clock
) -> None:
    """The refusal is final, names budget, owner, window, figures and reset; then all is open."""
    budgets = new_budgets()
    who = key(tokens_per_minute=20)

    clock.now_s = NOW_S + 15
    done = await budgets.reserve(request_id="a", key=who, estimate=tokens(20))
    budgets.settle(done, tokens(18))
    with pytest.raises(BudgetExhausted) as caught:
        await budgets.reserve(request_id="b", key=who, estimate=tokens(3))
    # Rebuilt from what __reduce__ says, as between processes.
    error = copy.copy(caught.value)
    assert error.final and error.cap == "tokens_per_minute"
    assert error.reset_s == NOW_S + 60
    assert error.headers["x-ratelimit-remaining-tokens"] == "2"
    assert str(error) == (
        "The budget of 20 tokens per minute of the key 'team' is exhausted: 18 tokens are "
        "spent, and this request may need 3 tokens. It starts anew at 2027-01-15T08:01:00Z "
        "(in 45 s)."
    )
    with pytest.raises(BudgetExhausted, match="too small for this request"):
        await budgets.reserve(request_id="c", key=who, estimate=tokens(21))
    clock.now_s = NOW_S + 60
    await budgets.reserve(request_id="d", key=who, estimate=tokens(20))


async def test_a_request_waits_for_others_in_flight(
    database: Database, new_budgets: NewBudgets
) -> None:
    """What others only hold is waited for; after `wait_s` the refusal says to come back."""
    patient, hasty = (
        new_budgets(server={"tokens_per_day": 100}, wait_s=wait_s) for wait_s in (60, 0)
    )

    first = await patient.reserve(request_id="a", key=None, estimate=tokens(90))
    with pytest.raises(BudgetExhausted, match="held by requests in flight") as caught:
        await hasty.reserve(request_id="b", key=None, estimate=tokens(50))
    assert not caught.value.final
    waiting = asyncio.create_task(patient.reserve(request_id="c", key=None, estimate=tokens(50)))
    await until(lambda: bool(patient._waiting))
    assert not waiting.done()
    patient.settle(first, tokens(10))
    assert (await waiting).counted
    assert spent(database) == (10, 50)


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


async def test_four_replicas_share_one_budget(database: Database, new_budgets: NewBudgets) -> None:
    """200 clients on four replicas use at least 99% of a cap, never more, and nothing twice."""
    replicas = [new_budgets(server={"tokens_per_day": 10_000}, wait_s=60) for _ in range(4)]
    random, used = Random(7), []

    async def client(number: int) -> None:
        budgets = replicas[number % 4]
        for turn in range(1000):
            try:
                reservation = await budgets.reserve(
                    request_id=f"{number}-{turn}", key=None, estimate=tokens(100)
                )
            except BudgetExhausted as error:
                assert error.final
                return
            await asyncio.sleep(random.random() * 0.01)
            amount = random.randint(0, 100)
            used.append(amount)
            budgets.settle(reservation, tokens(amount))

    await asyncio.gather(*(client(number) for number in range(200)))
    await asyncio.gather(*(budgets.close() for budgets in replicas))
    assert 9900 <= sum(used) <= 10_000
    assert spent(database) == (sum(used), 0)


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


def test_a_new_cap_counts_what_was_spent_before_it(
    database: Database, new_budgets: NewBudgets, new_ledger: Callable[..., Ledger]
) -> None:
    """A cap put on a day that is under way starts from the ledger; refusals don't count there."""
    ledger = new_ledger()
    rows: list[dict[str, object]] = [
        {"key_id": "key_a"},
        {"key_id": "key_b", "status": 499},
        {"key_id": "key_a", "status": 429, "members": {}},
        {"key_id": None},
        {"key_id": None, "endpoint": "shadow"},
    ]
    for number, fields in enumerate(rows):
        used = {"time_s": NOW_S - 60, "prompt_tokens": 10, "output_tokens": 10}
        ledger.record(record(10 + number, **used, **fields))
    ledger.record(record(5, time_s=NOW_S - 86400))
    ledger.stop()
    budgets = new_budgets(server={"tokens_per_day": 1000, "requests_per_day": 10})

    async def run() -> dict[str, str]:
        who = key(tokens_per_day=900)
        return (await budgets.reserve(request_id="x", key=who, estimate=tokens(5))).headers

    headers = asyncio.run(run())
    assert spent(database) == (60, 5)
    assert spent(database, "key_a") == (20, 5)
    assert headers["x-ratelimit-remaining-requests"] == str(10 - 3 - 1)


async def test_budgets_survive_a_restart(database: Database, new_budgets: NewBudgets) -> None:
    """What was spent before all replicas stopped is still spent after."""
    first = new_budgets(server={"tokens_per_day": 100})
    done = await first.reserve(request_id="a", key=None, estimate=tokens(90))
    first.settle(done, tokens(60))
    await first.close()
    second = new_budgets(server={"tokens_per_day": 100})
    with pytest.raises(BudgetExhausted, match="60 tokens are spent"):
        await second.reserve(request_id="b", key=None, estimate=tokens(41))
    with pytest.raises(BudgetUnavailable, match="shutting down"):
        await first.reserve(request_id="c", key=None, estimate=tokens(1))


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


def test_refused_requests_do_not_count() -> None:
    """A request for which no model ran counts as nothing, not even its prompt."""
    refused = record(status=429, members={}, prompt_tokens=7, output_tokens=0, usd=0)
    assert used_amounts(refused)[:3] == (0, 0, 0)
    ran = record(prompt_tokens=3, output_tokens=4, usd=0.5, wh=0, gco2e=0)
    assert used_amounts(ran) == Amounts(1, 7, 500_000_000, 0, 0)


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
