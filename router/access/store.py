"""Keeps the book of budgets in the ledger's database, where every replica reads and writes it.

**The database is the one authority.** A reservation is a row, written in a transaction that
excludes all others (SQLite's write lock, an advisory lock in PostgreSQL) and reads the tallies it
decides on. So the caps are exact for any number of replicas, machines and restarts, and there is
no actor whose death would need a protocol of its own. Leasing chunks of budget to replicas would
save this trip, at the price of budget stranded in idle replicas and of recalling it near the cap;
a replica's concurrent requests share one trip (`budgets`), so that is a bad trade. A hold is itself
a lease on one request's estimate: renewed while its replica lives, given back when it does not.

Commits survive the death of a process, and PostgreSQL's own. A power cut may lose the last moments
of an SQLite file (`synchronous = NORMAL`): fsync on the request path would cost more than such a
moment's spend.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from policies.footprint import Cost
from router.access.book import Book, Hold, Shortage, Tally
from router.access.limits import NOTHING, SERVER, TEAM, Amounts, Limit, Window
from router.ledger.database import BUDGET_LOCK, Database, writing
from router.ledger.queries import SERVED, Period, spend, total
from router.ledger.schema import BUDGET_HOLDS, BUDGET_WINDOWS, REQUESTS
from router.record import RequestRecord

# A window is forgotten two days after its end, a lapsed hold after one: nothing runs that long.
_KEPT_WINDOW_S = 2 * 86400
_KEPT_HOLD_S = 86400

# Statements are built once: building them anew would cost more than running them.
_SELECT_HOLDS = sa.select(BUDGET_HOLDS).where(
    BUDGET_HOLDS.c.request_id.in_(sa.bindparam("ids", expanding=True))
)
_SELECT_EXPIRED = sa.select(BUDGET_HOLDS).where(
    ~BUDGET_HOLDS.c.lapsed, BUDGET_HOLDS.c.expires_s <= sa.bindparam("now_s")
)
_DELETE_HOLDS = sa.delete(BUDGET_HOLDS).where(
    BUDGET_HOLDS.c.request_id.in_(sa.bindparam("ids", expanding=True))
)
_UPDATE_HOLD = sa.update(BUDGET_HOLDS).where(BUDGET_HOLDS.c.request_id == sa.bindparam("id"))
_INSERT_HOLD = sa.insert(BUDGET_HOLDS)
_SELECT_WINDOWS = sa.select(BUDGET_WINDOWS).where(
    BUDGET_WINDOWS.c.window_id.in_(sa.bindparam("ids", expanding=True))
)
_INSERT_WINDOW = sa.insert(BUDGET_WINDOWS)
_UPDATE_WINDOW = sa.update(BUDGET_WINDOWS).where(BUDGET_WINDOWS.c.window_id == sa.bindparam("id"))


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """A request to admit: what it may use at most, and the limits that it must fit."""

    request_id: str
    amounts: Amounts
    limits: tuple[Limit, ...]


@dataclass(frozen=True, kw_only=True)
class Settle:
    """A request that ended, and what it used.

    `windows` are those that admitted it. Where its hold is not found they are charged all the
    same, unless this is `again`: then the first try may have been committed unseen.
    """

    request_id: str
    used: Amounts
    windows: tuple[str, ...] = ()
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Whether a request was admitted (`shortage` is None), and what each limit has left."""

    shortage: Shortage | None
    remaining: tuple[tuple[Limit, int], ...]


class BudgetStore:
    """The book in `database`, for the replica `holder`. Used by one thread."""

    def __init__(self, database: Database, *, holder: str, lease_s: float) -> None:
        self._database = database
        self._holder = holder
        self._lease_s = lease_s

    def apply(
        self, settles: Sequence[Settle], reserves: Sequence[Reserve], now_s: float
    ) -> tuple[list[Admission], list[Settle]]:
        """Settle, then try the reservations in order, all in one transaction.

        Returns an admission per reservation, and what was settled without a hold. Raises
        SQLAlchemy's errors; then nothing happened.
        """
        windows = {limit.window.id: limit.window for r in reserves for limit in r.limits}
        with writing(self._database, lock=BUDGET_LOCK) as connection:
            ids = [s.request_id for s in settles] + [r.request_id for r in reserves]
            settled = [name for settle in settles for name in settle.windows]
            before = _load(connection, _holds(connection, ids), windows, settled)
            after = Book(before.tallies, before.holds)
            unknown = [s for s in settles if not after.settle(s.request_id, s.used)]
            unknown = [settle for settle in unknown if settle.used != NOTHING]
            for settle in unknown:
                if not settle.again:
                    after.charge(settle.windows, settle.used)
            admissions = [self._reserve(after, reserve, now_s) for reserve in reserves]
            _save(connection, before, after)
        return admissions, unknown

    def renew(self, now_s: float) -> None:
        """Prolong all holds of this replica."""
        with writing(self._database, lock=BUDGET_LOCK) as connection:
            connection.execute(
                sa.update(BUDGET_HOLDS)
                .where(BUDGET_HOLDS.c.holder == self._holder, ~BUDGET_HOLDS.c.lapsed)
                .values(expires_s=now_s + self._lease_s)
            )

    def sweep(self, now_s: float) -> None:
        """Give back what dead replicas held, and forget what is long over."""
        with self._database.connect() as connection:
            if not connection.execute(_SELECT_EXPIRED, {"now_s": now_s}).first():
                return
        with writing(self._database, lock=BUDGET_LOCK) as connection:
            expired = connection.execute(_SELECT_EXPIRED, {"now_s": now_s})
            holds = [_read_hold(row) for row in expired]
            before = _load(connection, holds)
            after = Book(before.tallies, before.holds)
            after.lapse(now_s, _recorded(connection, before.holds))
            _save(connection, before, after)

    def forget(self, now_s: float) -> None:
        """Delete windows and lapsed holds that nothing can refer to any more."""
        with writing(self._database, lock=BUDGET_LOCK) as connection:
            connection.execute(
                sa.delete(BUDGET_WINDOWS).where(BUDGET_WINDOWS.c.end_s < now_s - _KEPT_WINDOW_S)
            )
            connection.execute(
                sa.delete(BUDGET_HOLDS).where(
                    BUDGET_HOLDS.c.lapsed, BUDGET_HOLDS.c.expires_s < now_s - _KEPT_HOLD_S
                )
            )

    def _reserve(self, book: Book, reserve: Reserve, now_s: float) -> Admission:
        hold = Hold(
            request_id=reserve.request_id,
            holder=self._holder,
            amounts=reserve.amounts,
            windows=tuple(dict.fromkeys(limit.window.id for limit in reserve.limits)),
            expires_s=now_s + self._lease_s,
        )
        shortage = book.reserve(hold, reserve.limits)
        remaining = tuple((limit, book.remaining(limit)) for limit in reserve.limits)
        return Admission(shortage=shortage, remaining=remaining)


def used_amounts(request: RequestRecord | sa.Row[Any]) -> Amounts:
    """Return what a request that ended counts for: nothing, unless a model ran for it."""
    ran = request.answered_by is not None
    cost = Cost(usd=request.usd, wh=request.wh, gco2e=request.gco2e)
    tokens = request.prompt_tokens + request.output_tokens if ran else 0
    return Amounts.of(requests=int(ran), tokens=tokens, cost=cost)


def _holds(connection: sa.Connection, ids: Collection[str]) -> list[Hold]:
    return [_read_hold(row) for row in connection.execute(_SELECT_HOLDS, {"ids": list(ids)})]


def _load(
    connection: sa.Connection,
    holds: Iterable[Hold],
    windows: Mapping[str, Window] = MappingProxyType({}),
    others: Iterable[str] = (),
) -> Book:
    """Read `windows`, those that `holds` are in, and `others`, where there are such.

    One of `windows` that is new starts with what the ledger has.

    What the ledger has is nothing for a window that has just begun, and what was spent so far
    where a cap was put on a window that is under way.
    """
    held = {hold.request_id: hold for hold in holds}
    wanted = {*windows, *others, *(name for hold in held.values() for name in hold.windows)}
    rows = connection.execute(_SELECT_WINDOWS, {"ids": list(wanted)})
    tallies = {row.window_id: read_tally(row) for row in rows}
    for name, window in windows.items():
        if name not in tallies:
            spent = _spent_before(connection, window)
            tallies[name] = Tally(spent=spent, estimated=spent)
            row = {"window_id": name, "end_s": window.end_s, **_tally_values(tallies[name])}
            connection.execute(_INSERT_WINDOW, row)
    return Book(tallies, held)


def _save(connection: sa.Connection, before: Book, after: Book) -> None:
    changed = [
        {"id": name, **_tally_values(tally)}
        for name, tally in after.tallies.items()
        if tally is not before.tallies[name]
    ]
    if changed:
        connection.execute(_UPDATE_WINDOW, changed)
    gone = [name for name in before.holds if name not in after.holds]
    if gone:
        connection.execute(_DELETE_HOLDS, {"ids": gone})
    new = [hold for name, hold in after.holds.items() if name not in before.holds]
    if new:
        connection.execute(_INSERT_HOLD, [_hold_values(hold) for hold in new])
    lapsed = [
        {"id": name, "lapsed": True, "windows": list(hold.windows)}
        for name, hold in after.holds.items()
        if hold.lapsed and name in before.holds and not before.holds[name].lapsed
    ]
    if lapsed:
        connection.execute(_UPDATE_HOLD, lapsed)


def _spent_before(connection: sa.Connection, window: Window) -> Amounts:
    """Return what the ledger says was used in `window`; shadows have caps of their own."""
    row = REQUESTS.c
    where = [*Period(since_s=window.start_s, until_s=window.end_s).holds(), SERVED]
    where.append(row.answered_by.is_not(None))
    if window.scope != SERVER:
        of_team = window.scope.startswith(TEAM)
        where.append((row.team_id if of_team else row.key_id) == window.scope)
    found = total(spend(connection, where=where))
    tokens = found.prompt_tokens + found.output_tokens
    return Amounts.of(requests=found.num_requests, tokens=tokens, cost=found)


def _recorded(connection: sa.Connection, ids: Collection[str]) -> dict[str, Amounts]:
    """Return what the ledger says that the requests `ids` used, where it has them."""
    query = sa.select(REQUESTS).where(REQUESTS.c.request_id.in_(ids))
    return {row.request_id: used_amounts(row) for row in connection.execute(query)}


def read_tally(row: sa.Row[Any]) -> Tally:
    """Return the window that a row of the table `budget_windows` holds."""
    values = row._mapping
    return Tally(
        **{
            state: Amounts(*(values[f"{state}_{name}"] for name in Amounts._fields))
            for state in ("spent", "held", "estimated")
        }
    )


def _tally_values(tally: Tally) -> dict[str, int]:
    return {
        f"{state}_{name}": getattr(getattr(tally, state), name)
        for state in ("spent", "held", "estimated")
        for name in Amounts._fields
    }


def _read_hold(row: sa.Row[Any]) -> Hold:
    return Hold(
        request_id=row.request_id,
        holder=row.holder,
        amounts=Amounts(*(row._mapping[name] for name in Amounts._fields)),
        windows=tuple(row.windows),
        expires_s=row.expires_s,
        lapsed=row.lapsed,
    )


def _hold_values(hold: Hold) -> dict[str, Any]:
    return {
        "request_id": hold.request_id,
        "holder": hold.holder,
        "expires_s": hold.expires_s,
        "lapsed": hold.lapsed,
        "windows": list(hold.windows),
        **hold.amounts._asdict(),
    }
