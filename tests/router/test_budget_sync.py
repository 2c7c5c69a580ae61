"""Budget targets across replicas and restarts: the ledger knows what all of them have spent."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from policies.base import Decision, ModelFacts, Query
from policies.budget.controller import Controller
from policies.budget.prices import BudgetTarget
from policies.budgeted import Budgeted
from policies.footprint import Rates
from policies.plan import Answer
from router.background import BudgetSync, read_spending
from router.ledger.calls import Calls
from router.ledger.database import Database
from router.ledger.writer import Ledger
from router.record import RequestRecord
from tests.router.conftest import Running
from tests.router.ledger.records import record as plausible
from tests.server import until

DAY_S = 86_400.0
NOON_S = 20_000 * DAY_S + DAY_S / 2
RATES = Rates(usd_per_input_token=0.0, usd_per_output_token=0.01)


def record(number: int, **fields: Any) -> RequestRecord:
    """Return the record of a request at noon that cost one dollar."""
    values = {
        "time_s": NOON_S - 60 * number,
        "policy": "thrifty",
        "usd": 1.0,
        "wh": 2.0,
        "gco2e": 3.0,
        **fields,
    }
    return plausible(number, **values)


def controller() -> Controller:
    """Return a controller at noon with a target in dollars."""
    return Controller(
        models={"m": ModelFacts(name="m", rates=RATES)},
        clock=lambda: NOON_S,
        targets=[BudgetTarget(resource="usd", amount=10.0)],
    )


def test_spending_is_that_of_the_windows_answered_requests(
    new_ledger: Callable[..., Ledger],
) -> None:
    """Other policies, refused requests and yesterday do not count."""
    ledger = new_ledger()
    records = [
        record(1),
        record(2),
        record(3, policy="other"),
        record(4, status=429),
        record(5, time_s=NOON_S - DAY_S),
    ]
    for one in records:
        ledger.record(one)
    asyncio.run(ledger.close())
    since_s = NOON_S - DAY_S / 2
    spending = read_spending(ledger.database, policy="thrifty", since_s=since_s)
    assert spending is not None
    assert spending.num_requests == 2
    assert spending.first_s == pytest.approx(NOON_S - 120)
    assert (spending.usd, spending.wh, spending.gco2e) == (2.0, 4.0, 6.0)
    assert read_spending(ledger.database, policy="nobody", since_s=since_s) is None


def test_a_controller_learns_what_other_replicas_spent(
    new_ledger: Callable[..., Ledger],
) -> None:
    """The background task tells it, with what it still has running on top."""
    ledger = new_ledger()
    for number in range(5):
        ledger.record(record(number))
    mine = controller()
    mine.choose(Query(text=""), Decision(plan=Answer(members=("m",)), scores={"m": 0.5}))
    running_usd = mine.spent()["usd"]
    assert running_usd > 0

    async def sync() -> None:
        await ledger.flush()
        background = BudgetSync({"thrifty": mine}, ledger.database, clock=lambda: NOON_S)
        task = asyncio.create_task(background.run())
        async with asyncio.timeout(60):
            while mine.spent()["usd"] == running_usd:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await ledger.close()

    asyncio.run(sync())
    assert mine.spent()["usd"] == pytest.approx(5.0 + running_usd)


REFUSED: dict[str, dict[str, Any]] = {
    "by a ceiling, at its second prompt": {"prompt": ["a", "a " * 200], "shoal": {"max_usd": 2e-4}},
    "by too many lanes": {"prompt": "a", "n": 128},
    "by a cap": {"prompt": "a " * 1000},
    "by its engine": {"prompt": "a"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_no_spending(serve: Callable[..., Running], case: str) -> None:
    """Whoever refuses a request that was decided, its estimate does not stay in the books."""
    full = case == "by its engine"
    server = serve(
        engines=[{"name": "one", "kind": "fake", "options": {"refuse": full}}],
        policies={
            "auto": {
                "kind": "budgeted",
                "policy": {"kind": "fixed", "plan": "alpha"},
                "targets": [{"resource": "usd", "amount": 10.0}],
            }
        },
        models=[{"name": "alpha", "engine": "one", "usd_per_million_input_tokens": 1}],
        app={"budgets": {"server": {"tokens_per_hour": 500}}},
    )
    controller = server.service.catalog.policies.controllers["auto"]
    response = server.post("/v1/completions", model="auto", max_tokens=8, **REFUSED[case])
    assert response.status_code in (400, 429, 503), response.text
    server.settle()
    assert controller.spent()["usd"] == 0.0
    assert server.last_record().policy == "auto"


def test_who_leaves_while_a_policy_decides_spends_nothing(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long text is decided in a thread, which goes on: its estimate is taken back at the end."""
    server = serve(
        engines=[{"name": "one", "kind": "fake", "options": {"context_tokens": 100_000}}],
        policies={
            "auto": {
                "kind": "budgeted",
                "policy": {"kind": "fixed", "plan": "alpha"},
                "targets": [{"resource": "usd", "amount": 10.0}],
            }
        },
        models=[{"name": "alpha", "engine": "one", "usd_per_million_input_tokens": 1}],
    )
    controller = server.service.catalog.policies.controllers["auto"]
    entered, release, decide, noted = threading.Event(), threading.Event(), Budgeted.decide, []

    def slow(policy: Budgeted, query: Query) -> Decision:
        entered.set()
        release.wait(60)
        decision = decide(policy, query)
        noted.append(controller.spent()["usd"])
        return decision

    monkeypatch.setattr(Budgeted, "decide", slow)
    response = server.post(
        "/v1/completions", model="auto", prompt="a " * 20_000, shoal={"timeout_s": 0.5}
    )
    assert (response.status_code, entered.is_set(), noted) == (504, True, [])
    release.set()
    until(lambda: bool(noted) and controller.spent()["usd"] == 0.0, 60)
    assert noted[0] > 0


def test_a_database_that_fails_is_logged_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    """Without the table nothing is raised into the server; the own count goes on."""
    database = Database(sa.create_engine("sqlite://"))
    mine = controller()

    async def sync() -> None:
        background = BudgetSync({"thrifty": mine}, database, interval_s=0.01, clock=lambda: NOON_S)
        task = asyncio.create_task(background.run())
        async with asyncio.timeout(60):
            while len(caplog.records) < 2:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with caplog.at_level(logging.WARNING, "router.background"):
        asyncio.run(sync())
    database.dispose()
    assert "keep their own count" in caplog.text
    assert mine.spent() == {"usd": 0.0}


def test_a_cancelled_task_leaves_no_query_behind() -> None:
    """Whoever closes the database after cancelling finds every connection given back."""
    entered, release, left = threading.Event(), threading.Event(), threading.Event()

    def query() -> None:
        entered.set()
        release.wait(60)
        left.set()

    calls = Calls(timeout_s=60)

    async def cancel() -> None:
        task = asyncio.create_task(calls.run(query))
        await asyncio.to_thread(entered.wait, 60)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        release.set()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert left.is_set()
        assert task.cancelled()

    asyncio.run(cancel())
    calls.close()
