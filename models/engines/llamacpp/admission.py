"""Who runs next: at most so many requests at once; clients take turns, offline work comes last."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

from models.errors import EngineFailed, EngineOverloaded


@dataclass(eq=False, frozen=True)
class Ticket:
    """One request's place, for a client; `admitted` is set once it may run."""

    client_id: str
    weight: float
    offline: bool
    admitted: asyncio.Future[None]


class Admission:
    """At most `num_slots` requests run and `max_queued` wait. Used on the event loop only.

    The next slot goes to the client with the fewest requests running for its weight, among equals
    to the request that has waited longest; to those that are offline only where no other waits.
    """

    def __init__(self, *, num_slots: int, max_queued: int) -> None:
        self.num_slots = num_slots
        self._max_queued = max_queued
        self._waiting: list[Ticket] = []
        self._running: Counter[str] = Counter()
        self._num_finished = 0
        self._busy_s = 0.0
        self._busy_since_s = 0.0

    @property
    def num_running(self) -> int:
        """How many requests hold a slot."""
        return self._running.total()

    @property
    def num_waiting(self) -> int:
        """How many requests wait for one."""
        return len(self._waiting)

    @property
    def busy_s(self) -> float:
        """For how long at least one request has been running."""
        return self._busy_s + (time.perf_counter() - self._busy_since_s if self._running else 0.0)

    async def enter(self, client_id: str, *, weight: float = 1.0, offline: bool = False) -> Ticket:
        """Wait for a slot; raises `EngineOverloaded` where too many wait already."""
        ticket = Ticket(client_id, weight, offline, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        self._admit()
        if self.num_waiting > self._max_queued:
            self._waiting.remove(ticket)
            each_s = self.busy_s / max(self._num_finished, 1)
            raise EngineOverloaded(
                f"{self.num_waiting} requests wait already", max(self.num_waiting * each_s, 1.0)
            )
        try:
            await ticket.admitted
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            else:
                self.leave(ticket)
            raise
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give a slot back, and admit who waits for it."""
        self._running[ticket.client_id] -= 1
        self._running = +self._running  # forgets who runs nothing
        self._num_finished += 1
        if not self._running:
            self._busy_s += time.perf_counter() - self._busy_since_s
        self._admit()

    def close(self, error: EngineFailed) -> None:
        """Have all who wait raise `error`."""
        for ticket in self._waiting:
            ticket.admitted.set_exception(error)
        self._waiting.clear()

    def _admit(self) -> None:
        while self._waiting and self.num_running < self.num_slots:
            ticket = min(
                self._waiting, key=lambda t: (t.offline, self._running[t.client_id] / t.weight)
            )
            if not self._running:
                self._busy_since_s = time.perf_counter()
            self._waiting.remove(ticket)
            self._running[ticket.client_id] += 1
            ticket.admitted.set_result(None)
