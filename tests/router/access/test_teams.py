"""A key's caps and its team's hold together: in any order of events, and over replicas."""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.footprint import Cost
from router.access.book import Book, Hold, Tally
from router.access.budgets import Budgets
from router.access.keys import change_key, create_key, create_team
from router.access.limits import Amounts, BudgetExhausted, BudgetsConfig, Limit, limits, read_caps
from router.ledger.database import Database, open_database

NOW_S = 1_800_000_000.0
KEYS = ("key_a", "key_b", "key_c")

# A cap or none for the team and for each key; then who asks for how many tokens, or settles.
CAPS = st.one_of(st.none(), st.integers(0, 60))
EVENTS = st.lists(
    st.tuples(st.sampled_from(KEYS), st.integers(0, 30), st.integers(0, 30)), max_size=40
)


def _tokens(count: int) -> Amounts:
    return Amounts.of(tokens=count, cost=Cost())


def _limits(scope: str, cap: int | None) -> tuple[Limit, ...]:
    caps = {} if cap is None else {"tokens_per_month": float(cap)}
    return limits(scope, read_caps(caps, scope), NOW_S)


@settings(max_examples=200)
@given(team=CAPS, own=st.tuples(CAPS, CAPS, CAPS), events=EVENTS)
def test_a_request_is_admitted_when_it_fits_both(
    team: int | None, own: tuple[int | None, ...], events: list[tuple[str, int, int]]
) -> None:
    """Against a reference that adds up by hand: admitted exactly when every sum stays in its cap.

    Every second request stays in flight; the others settle to what they used, at most what they
    had held.
    """
    caps = dict(zip(KEYS, own, strict=True))
    book, names = Book({}, {}), itertools.count()
    load = dict.fromkeys(("team_t", *KEYS), 0)  # spent and held
    for turn, (key, estimate, used) in enumerate(events):
        found = _limits(key, caps[key]) + _limits("team_t", team)
        for limit in found:
            book.tallies.setdefault(limit.window.id, Tally())
        hold = Hold(
            request_id=str(next(names)),
            holder="here",
            amounts=_tokens(estimate),
            windows=tuple(limit.window.id for limit in found),
            expires_s=NOW_S + 60,
        )
        fits = all(
            cap is None or load[scope] + estimate <= cap
            for scope, cap in ((key, caps[key]), ("team_t", team))
        )
        assert (book.reserve(hold, found) is None) == fits
        if not fits:
            continue
        took = estimate
        if turn % 2:
            took = min(used, estimate)
            book.settle(hold.request_id, _tokens(took))
        load[key] += took
        load["team_t"] += took


@pytest.mark.parametrize("team_cap", [400, 1000])
async def test_both_caps_are_exact_over_replicas(
    ledger_url: str, database: Database, team_cap: int
) -> None:
    """Three keys of a team, three replicas, 150 clients at once: not a token more, nor fewer."""
    create_team(database, name="blue", caps={"tokens_per_month": team_cap})
    keys = [
        create_key(database, name=name, team="blue", caps={"tokens_per_month": 200})[0]
        for name in ("a", "b")
    ]
    keys.append(create_key(database, name="c", team="blue")[0])
    replicas = [
        Budgets(
            open_database(ledger_url),
            BudgetsConfig(wait_s=30),
            holder=f"replica-{number}",
            logger=logging.getLogger("test.teams"),
            clock=lambda: NOW_S,
        )
        for number in range(3)
    ]
    used = {key.id: 0 for key in keys}

    async def client(number: int) -> None:
        key, budgets = keys[number % 3], replicas[number // 3 % 3]
        try:
            reservation = await budgets.reserve(
                request_id=str(number), key=key, estimate=_tokens(20)
            )
        except BudgetExhausted as error:
            assert error.final
            return
        await asyncio.sleep(0.001 * (number % 5))
        used[key.id] += 10
        budgets.settle(reservation, _tokens(10))

    await asyncio.gather(*map(client, range(150)))
    for budgets in replicas:
        budgets.stop()
    # The last 10 tokens of a cap have no room for an estimate of 20.
    assert used[keys[0].id] in (190, 200) or sum(used.values()) >= team_cap - 10
    assert all(used[key.id] <= 200 for key in keys[:2])
    if team_cap == 400:
        assert sum(used.values()) in (390, 400)
    else:
        assert [used[key.id] for key in keys] == [190, 190, 500]


async def test_a_key_moves_and_its_requests_stay_where_they_were(
    ledger_url: str, database: Database
) -> None:
    """What was admitted under a team settles there, though the key has left in the meantime."""
    for name in ("old", "new"):
        create_team(database, name=name, caps={"tokens_per_month": 100})
    key, _ = create_key(database, name="k", team="old")
    moved = change_key(database, key.id, team="new")
    budgets = Budgets(
        open_database(ledger_url),
        BudgetsConfig(wait_s=0),
        holder="here",
        logger=logging.getLogger("test.teams"),
        clock=lambda: NOW_S,
    )

    first = await budgets.reserve(request_id="1", key=key, estimate=_tokens(90))
    second = await budgets.reserve(request_id="2", key=moved, estimate=_tokens(90))
    budgets.settle(first, _tokens(90))
    budgets.settle(second, _tokens(0))
    with pytest.raises(BudgetExhausted, match="team 'old'"):
        await budgets.reserve(request_id="3", key=key, estimate=_tokens(20))
    await budgets.reserve(request_id="4", key=moved, estimate=_tokens(100))
    budgets.stop()
