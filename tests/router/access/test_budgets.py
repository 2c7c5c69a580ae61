"""Budgets on real databases, with several replicas in one process: what they count."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from random import Random

import pytest
import sqlalchemy as sa

from router.access.limits import NOTHING, Amounts, BudgetExhausted, BudgetUnavailable
from router.access.store import used_amounts
from router.ledger.database import Database
from router.ledger.writer import Ledger
from tests.clock import Clock, until
from tests.router.access.budgeting import NOW_S, NewBudgets, key, spent, tokens
from tests.router.ledger.records import record


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


def test_refused_requests_do_not_count() -> None:
    """A request for which no model ran counts as nothing, not even its prompt."""
    refused = record(status=429, members={}, prompt_tokens=7, output_tokens=0, usd=0)
    assert used_amounts(refused)[:3] == (0, 0, 0)
    ran = record(prompt_tokens=3, output_tokens=4, usd=0.5, wh=0, gco2e=0)
    assert used_amounts(ran) == Amounts(1, 7, 500_000_000, 0, 0)
