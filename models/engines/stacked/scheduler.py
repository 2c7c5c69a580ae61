"""Who runs in the next step: admission by cache rows, fair queueing, chunked prefill.

Waiting requests are queued per client. The client that was served least goes first, by a counter
of tokens times lanes (virtual token counters, Sheng et al. 2024, "Fairness in Serving Large
Language Models", algorithm 2); a client that comes back from idleness starts level with the least
served one that is waiting or running. A request is admitted once the arena has room for its whole
answer, so nothing that runs is ever evicted; one that does not fit holds back those behind it, so
that large requests don't starve.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from models.engines.stacked.layout import Arena, Part, order_parts
from models.engines.stacked.sequence import Sequence


class Scheduler:
    """Keeps the queue and the running requests; used by the engine's thread only."""

    def __init__(self, arena: Arena, *, step_rows: int) -> None:
        """`step_rows` bounds the rows of a step; decoding comes first, prefill takes the rest."""
        self._arena = arena
        self._step_rows = step_rows
        self._waiting: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}
        self.running: list[Sequence] = []
        self.num_waiting = 0

    @property
    def sequences(self) -> Iterator[Sequence]:
        """Everything in the engine, running first."""
        yield from self.running
        for queue in self._waiting.values():
            yield from queue

    def add(self, sequence: Sequence) -> None:
        """Put a request at the end of its client's queue, and admit what can be."""
        client = sequence.request.client_id
        if client not in self._served:
            self._served[client] = min(self._served.values(), default=0)
        self._waiting.setdefault(client, deque()).append(sequence)
        self.num_waiting += 1
        self._admit()

    def remove(self, sequence: Sequence) -> None:
        """Forget a request, and free its rows if it has any."""
        client = sequence.request.client_id
        if sequence.region_start is None:
            self._waiting[client].remove(sequence)
            self._drop_empty_queue(client)
            self.num_waiting -= 1
        else:
            self.running.remove(sequence)
            self._arena.release(sequence.region_start, sequence.num_rows)
            sequence.region_start = None
        if client not in self._waiting and all(
            other.request.client_id != client for other in self.running
        ):
            del self._served[client]
        self._admit()

    def next_step(self) -> list[Part]:
        """Choose the next step's parts: every decoding request, then prefill chunks in turn."""
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        parts = [Part(sequence=sequence, num_tokens=1) for sequence in decoding]
        room = self._step_rows - sum(sequence.num_lanes for sequence in decoding)
        for sequence in self.running:
            if sequence.num_pending == 1:
                continue
            # The oldest prefill always moves on, however many requests decode.
            least = 0 if len(parts) > len(decoding) else 1
            num_tokens = min(sequence.num_pending, max(room // sequence.num_lanes, least))
            if num_tokens > 0:
                parts.append(Part(sequence=sequence, num_tokens=num_tokens))
                room -= num_tokens * sequence.num_lanes
        for part in parts:
            self._served[part.sequence.request.client_id] += part.num_rows
        return order_parts(parts)

    def _admit(self) -> None:
        while self._waiting:
            client = min(self._waiting, key=lambda name: self._served[name])
            sequence = self._waiting[client][0]
            sequence.region_start = self._arena.allocate(sequence.num_rows)
            if sequence.region_start is None:
                return
            # Charged in advance by a step, so that clients alternate when several are admitted.
            self._served[client] += sequence.num_lanes
            self._waiting[client].popleft()
            self._drop_empty_queue(client)
            self.num_waiting -= 1
            self.running.append(sequence)

    def _drop_empty_queue(self, client: str) -> None:
        if not self._waiting[client]:
            del self._waiting[client]
