"""Database calls of the event loop: on few threads of their own, for clients in turn, in time, and
not while it is away.

A database that hangs holds these threads and nothing else: whoever waits gets
`DatabaseUnavailable` in time, and for a moment after a failure nobody waits at all. Then one call
tries whether it answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import Any, ParamSpec, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from models.fair import FairQueue, settle

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_MOST_WAITING = 512
_PAUSE_S = 1.0  # after a failure

# When the present thread's statements are too late, by `time.monotonic`; SQLite asks.
STATEMENT_DEADLINE_S: ContextVar[float] = ContextVar("shoal_statement_deadline", default=1e18)

_Call: TypeAlias = tuple[Future[Any], Callable[[], Any]]


class DatabaseUnavailable(SQLAlchemyError):
    """The database does not answer, or not in time; come back in `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = _PAUSE_S) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def is_away(error: BaseException) -> bool:
    """Whether the database is at fault, and not what it was asked: the same may succeed later.

    It may be gone, locked, slow, damaged, or take nothing, as PostgreSQL's standby does.
    """
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if type(error) is sa.exc.DatabaseError:  # as SQLite says of a damaged file
        return True
    away = sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.InternalError
    return isinstance(error, away | sa.exc.TimeoutError | DatabaseUnavailable)


def reason(error: BaseException) -> str:
    """Return what the database says of `error`: neither statement nor PostgreSQL's DETAIL."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


def _asked_too_much(error: SQLAlchemyError) -> bool:
    """Whether `error` may be of what was asked: it took too long, or was too much at once."""
    orig = getattr(error, "orig", None)
    state = getattr(orig, "sqlstate", None) or ""  # PostgreSQL's: cancelled, a limit exceeded
    slow = isinstance(error, DatabaseUnavailable) or str(orig) == "interrupted"
    return slow or state == "57014" or state.startswith("54")


class Calls:
    """Runs blocking functions that use a database for one event loop.

    The threads start with the first call and never keep the process from ending.
    """

    def __init__(self, *, timeout_s: float, num_threads: int = 4) -> None:
        """Give each call `timeout_s`, the wait for a thread included."""
        self._timeout_s = timeout_s
        self._num_threads = num_threads
        self._calls: FairQueue[_Call] = FairQueue()
        self._threads: list[threading.Thread] = []
        self._away_until_s: float | None = None
        self._answered_s = float("-inf")  # when it last did

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `function` returns; raises `DatabaseUnavailable`, or what it raises.

        If cancelled, waits until it has ended, so that its caller may go on to close the database.
        """
        self._check()
        future: Future[T] = Future()
        self._calls.put((future, partial(function, *args, **kwargs)))
        if not self._threads:
            self._start()
        answer = asyncio.wrap_future(future)
        try:
            done, _ = await asyncio.wait([answer], timeout=self._timeout_s)
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.wait([answer], timeout=self._timeout_s)
            raise
        if not done:
            future.cancel()
            answer.cancel()
            raise self._failed(DatabaseUnavailable(f"no answer within {self._timeout_s:g} s"))
        try:
            found = answer.result()
        except SQLAlchemyError as error:
            raise (self._failed(error) if is_away(error) else error) from None
        self._answered_s = time.monotonic()
        if self._away_until_s is not None:
            self._away_until_s = None
            logger.warning("database: it answers again")
        return found

    @property
    def num_waiting(self) -> int:
        """How many calls wait for a thread."""
        return len(self._calls)

    def close(self, wait_s: float = 2.0) -> None:
        """End the threads when they have done what waits, or leave them behind after `wait_s`."""
        for _ in self._threads:
            self._calls.end()
        end_s = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        self._threads = []

    def _check(self) -> None:
        now_s = time.monotonic()
        if self._away_until_s is not None:
            if now_s < self._away_until_s:
                raise DatabaseUnavailable("it is away", self._away_until_s - now_s)
            self._away_until_s = now_s + self._timeout_s  # this call tries, others wait for it
        # As of the room for bodies, a client may have as much as all of them leave.
        if self._calls.num_own >= _MOST_WAITING - self.num_waiting:
            raise DatabaseUnavailable(f"{self.num_waiting} calls wait already")

    def _failed(self, error: SQLAlchemyError) -> DatabaseUnavailable:
        why = reason(error)
        if _asked_too_much(error) and time.monotonic() - self._answered_s < _PAUSE_S:
            # Others have their answers: who asks for too much is refused alone.
            return DatabaseUnavailable(why)
        if self._away_until_s is None:
            logger.error("database: does not answer, what needs it is refused: %s", why)
        self._away_until_s = time.monotonic() + _PAUSE_S
        return DatabaseUnavailable(why)

    def _start(self) -> None:
        for _ in range(self._num_threads):
            # A daemon: a database that hangs must not keep the process from ending.
            thread = threading.Thread(target=self._work, name="shoal-database", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            STATEMENT_DEADLINE_S.set(time.monotonic() + self._timeout_s)
            with contextlib.suppress(RuntimeError):  # the event loop is closed, nobody waits
                settle(*call)
