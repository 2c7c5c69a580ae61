"""What the ingress calls: `reserve` before a plan runs, `settle` after, whatever became of it.

One thread per replica talks to the database. Whatever was asked while it was busy goes into its
next transaction together, so that a transaction's cost is shared by the requests that came with
it, and the event loop never waits for the database. A request without a cap costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeAlias

from sqlalchemy.exc import SQLAlchemyError

from router.access.book import Shortage
from router.access.keys import Key
from router.access.limits import (
    NOTHING,
    SERVER,
    Amounts,
    BudgetExhausted,
    BudgetsConfig,
    BudgetUnavailable,
    Limit,
    limits,
    rate_limit_headers,
    to_text,
)
from router.access.store import Admission, BudgetStore, Reserve, Settle
from router.ledger.calls import reason
from router.ledger.database import Database
from router.workers import Worker

_RETRY_S = 0.05  # how often a waiting request is tried again
_ANSWER_S = 0.5  # what the database has to answer, beside the wait for others in flight
_AWAY_S = 0.5  # how often a database that is away is tried again
_CLOSE_S = 10.0
_UNCHECKED = "Budgets cannot be checked now; try again shortly."
_SWEEP_S = 1.0
_FORGET_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """An admitted request. `headers` are the x-ratelimit headers of its response.

    `windows` admitted it; where no cap applies there are none, and settling costs nothing.
    """

    request_id: str
    headers: dict[str, str]
    windows: tuple[str, ...] = ()

    @property
    def counted(self) -> bool:
        """Whether a cap applies."""
        return bool(self.windows)


@dataclass(kw_only=True, eq=False)
class _Waiting:
    """A request that waits for its admission on the event loop `loop` until `deadline_s`."""

    reserve: Reserve
    future: asyncio.Future[Admission]
    loop: asyncio.AbstractEventLoop
    deadline_s: float

    def answer(self, admission: Admission | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed, nobody waits
            self.loop.call_soon_threadsafe(self._answer, admission)

    def _answer(self, admission: Admission | Exception) -> None:
        if self.future.done():
            return
        if isinstance(admission, Exception):
            self.future.set_exception(admission)
        else:
            self.future.set_result(admission)


_Item: TypeAlias = _Waiting | Settle | None


class Budgets:
    """The caps of one replica's requests. `holder` names the replica, uniquely over time.

    `clock` gives Unix seconds; the replicas' clocks should agree within a fraction of `lease_s`.
    """

    def __init__(
        self,
        database: Database,
        config: BudgetsConfig,
        *,
        holder: str,
        logger: logging.Logger,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._config = config
        self._clock = clock
        self._logger = logger
        self._store = BudgetStore(database, holder=holder, lease_s=config.lease_s)
        self._server_caps = config.server_caps()
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._waiting: list[_Waiting] = []
        self._settles: list[Settle] = []
        self._open: set[str] = set()
        self._closed = threading.Event()
        self._away = False
        self.worker = Worker("budgets")
        self._thread = self.worker.start_thread(self._run)

    def configure(self, config: BudgetsConfig) -> None:
        """Let new requests be held to the caps of `config`; its `lease_s` stays as it was."""
        self._config, self._server_caps = config, config.server_caps()

    async def reserve(self, *, request_id: str, key: Key | None, estimate: Amounts) -> Reservation:
        """Admit a request that may use up to `estimate`; `settle` must follow.

        Waits up to `wait_s` where only other requests in flight are in the way. Raises
        `BudgetExhausted`, or `BudgetUnavailable` where the database does not answer.
        """
        now_s = self._clock()
        found = self._limits(key, now_s)
        if not found:
            return Reservation(request_id=request_id, headers={})
        if self._closed.is_set():
            raise BudgetUnavailable("The server is shutting down.")
        if self._away:
            raise BudgetUnavailable(_UNCHECKED)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(
            reserve=Reserve(request_id=request_id, amounts=estimate, limits=found),
            future=loop.create_future(),
            loop=loop,
            deadline_s=time.monotonic() + self._config.wait_s,
        )
        self._items.put(waiting)
        try:
            async with asyncio.timeout(self._config.wait_s + _ANSWER_S):
                admission = await waiting.future
        except (asyncio.CancelledError, TimeoutError) as error:
            # The client left, or the database is slow; what the thread may still decide is undone.
            self._items.put(Settle(request_id=request_id, used=NOTHING))
            if isinstance(error, TimeoutError):
                raise BudgetUnavailable(_UNCHECKED) from None
            raise
        headers = rate_limit_headers(admission.remaining, now_s)
        if admission.shortage is not None:
            raise _exhausted(admission.shortage, key, now_s, headers)
        windows = tuple(dict.fromkeys(limit.window.id for limit in found))
        return Reservation(request_id=request_id, headers=headers, windows=windows)

    def counts(self, key: Key | None) -> bool:
        """Whether there is a budget that counts what the requests of `key` use."""
        return bool(self._limits(key, self._clock()))

    def settle(self, reservation: Reservation, used: Amounts) -> None:
        """Charge what a request used instead of its estimate; neither blocks nor raises.

        Call it exactly once per reservation, also where the request failed or its client left.
        """
        if reservation.counted:
            self._items.put(
                Settle(request_id=reservation.request_id, used=used, windows=reservation.windows)
            )

    async def close(self) -> None:
        """Write what is still to be settled and end the thread; idempotent."""
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """Like `close`, for callers without an event loop."""
        if not self._closed.is_set():
            self._closed.set()
            self._items.put(None)
        self._thread.join(_CLOSE_S)
        self._database.dispose()

    def _limits(self, key: Key | None, now_s: float) -> tuple[Limit, ...]:
        found = limits(SERVER, self._server_caps, now_s)
        if key is not None:
            found += limits(key.id, self._config.key_caps(key.caps), now_s)
            if key.team is not None:
                found += limits(key.team.id, key.team.caps, now_s)
        return found

    # Everything below runs on the thread.

    def _run(self) -> None:
        swept_s = renewed_s = forgot_s = time.monotonic()
        while True:
            self._gather()
            now_s = time.monotonic()
            try:
                # Renewed first: after a standstill the sweep must not take our own holds for dead.
                if (self._open or self._settles) and now_s - renewed_s >= self._config.lease_s / 3:
                    renewed_s = now_s
                    self._store.renew(self._clock())
                if self._away or now_s - swept_s >= _SWEEP_S:
                    swept_s = now_s
                    self._store.sweep(self._clock())
                if now_s - forgot_s >= _FORGET_S:
                    forgot_s = now_s
                    self._store.forget(self._clock())
                self._transact(self._settles, self._waiting)
                if self._away:
                    self._away = False
                    self._logger.warning("budgets: the database answers again")
            except SQLAlchemyError as error:
                if not self._away:
                    self._logger.error("budgets: the database does not answer: %s", reason(error))
                self._away = True
                self._settles = [replace(settle, again=True) for settle in self._settles]
                # A commit that nobody saw end may hold for them, and be renewed for ever.
                undone = [w.reserve.request_id for w in self._waiting]
                self._refuse_waiting()
                if self._closed.is_set():
                    self._logger.error(
                        "budgets: %d requests are charged from the ledger, when their holds lapse",
                        len(self._settles),
                    )
                    return
                self._settles += [Settle(request_id=name, used=NOTHING) for name in undone]
                time.sleep(_AWAY_S)
            if self._closed.is_set() and not self._settles and self._items.empty():
                self._refuse_waiting()
                return

    def _gather(self) -> None:
        """Wait for something to do, then take all there is."""
        timeout_s = _RETRY_S if self._away else None
        if self._waiting or self._settles:
            timeout_s = _RETRY_S
        elif self._open:
            timeout_s = self._config.lease_s / 3
        try:
            item = self._items.get(timeout=timeout_s)
            while True:
                self._take(item)
                item = self._items.get_nowait()
        except queue.Empty:
            return

    def _take(self, item: _Item) -> None:
        if isinstance(item, _Waiting):
            self._waiting.append(item)
        elif isinstance(item, Settle):
            # A request that is still waiting holds nothing yet.
            self._waiting = [w for w in self._waiting if w.reserve.request_id != item.request_id]
            # Settled once already, or never admitted here: nothing is charged without a hold.
            admitted = item.request_id in self._open
            self._open.discard(item.request_id)
            self._settles.append(item if admitted else replace(item, windows=()))

    def _transact(self, settles: list[Settle], waiting: list[_Waiting]) -> None:
        """Put `settles` and `waiting` into the book; where that fails, its halves.

        So what cannot be counted, whatever the reason, fails alone. Raises SQLAlchemy's errors.
        """
        if not settles and not waiting:
            return
        try:
            admissions, unknown = self._store.apply(
                settles, [w.reserve for w in waiting], self._clock()
            )
        except SQLAlchemyError:
            raise
        except Exception as error:
            if len(settles) + len(waiting) > 1:
                # Of both what is settled first: one of each has no halves.
                half = len(settles) if waiting else len(settles) // 2
                rest = 0 if settles else len(waiting) // 2
                self._transact(settles[:half], waiting[:rest])
                self._transact(settles[half:], waiting[rest:])
                return
            self._logger.exception("budgets: a request cannot be counted")
            self._done(settles, waiting)
            for item in waiting:
                item.answer(error)
            return
        self._done(settles, waiting)
        for settle in unknown:
            told = "perhaps settled before" if settle.again else "it is charged all the same"
            self._logger.warning("budgets: %s has no hold; %s", settle.request_id, told)
        now_s = time.monotonic()
        for item, admission in zip(waiting, admissions, strict=True):
            shortage = admission.shortage
            if shortage is not None and not shortage.final and now_s < item.deadline_s:
                self._waiting.append(item)
                continue
            if shortage is None:
                self._open.add(item.reserve.request_id)
            item.answer(admission)

    def _done(self, settles: list[Settle], waiting: list[_Waiting]) -> None:
        done = {id(item) for item in (*settles, *waiting)}
        self._settles = [settle for settle in self._settles if id(settle) not in done]
        self._waiting = [item for item in self._waiting if id(item) not in done]

    def _refuse_waiting(self) -> None:
        for item in self._waiting:
            item.answer(BudgetUnavailable(_UNCHECKED))
        self._waiting = []


def _exhausted(
    shortage: Shortage, key: Key | None, now_s: float, headers: dict[str, str]
) -> BudgetExhausted:
    cap, window = shortage.limit.cap, shortage.limit.window
    whose = "the server"
    if key is not None and window.scope != SERVER:
        team = key.team if key.team and key.team.id == window.scope else None
        whose = f"the team {team.name!r}" if team else f"the key {key.name!r}"
    resets = datetime.fromtimestamp(window.end_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    budget = f"The budget of {to_text(cap.resource, cap.limit)} per {cap.period} of {whose}"
    spent, needed = (to_text(cap.resource, x) for x in (shortage.spent, shortage.needed))
    if not shortage.final:
        message = (
            f"{budget} is held by requests in flight: {spent} are spent, and this request may "
            f"need {needed}. Try again in a moment."
        )
    elif shortage.needed > cap.limit:
        message = f"{budget} is too small for this request, which may need {needed}."
    else:
        message = (
            f"{budget} is exhausted: {spent} are spent, and this request may need {needed}. "
            f"It starts anew at {resets} (in {max(0, int(window.end_s - now_s))} s)."
        )
    return BudgetExhausted(message, cap.name, float(window.end_s), shortage.final, headers)
