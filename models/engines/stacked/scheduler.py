"""Who runs in the next step: admission by cache rows, fair queueing, chunked prefill.

Waiting requests are queued per client and user. The client that was served least goes first, by a
counter of tokens times lanes over its weight (virtual token counters, Sheng et al. 2024, "Fairness
in Serving Large Language Models", algorithm 2), and of its users the one that was; offline work
after all others. Who comes back from idleness starts level with the least served one that is
waiting or running. Users are whom a client names: they divide its turns and add none. A request is
admitted once the arena has room for its whole answer, so nothing that runs is ever evicted; one
that does not fit holds back those behind it, so that large requests don't starve. One client's
requests leave an eighth of the arena to others, who need not wait for their end. In a step in which
several clients take part none decodes more rows for its weight than the smallest does, or a few,
and so with several users of one; who was left out comes first next time.

A lead of another shape runs on rows of its own, in steps of its own: `lead_step` chooses those.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator

from models.engines.base import Party
from models.engines.stacked.cache import Arena, PrefixCache
from models.engines.stacked.layout import Part, order_parts
from models.engines.stacked.sequence import Sequence

# What a client may always decode in a step, however little others do: fewer are hardly faster.
_LEAST_ROWS = 16
# The share of the arena that one client's requests leave to others.
_SPARED = 8


class Scheduler:
    """Keeps the queue and the running requests; used by the engine's thread only."""

    def __init__(
        self,
        arena: Arena,
        *,
        step_rows: int,
        keeps_prefixes: bool = True,
        scouts: PrefixCache | None = None,
    ) -> None:
        """`step_rows` bounds the rows of a step; decoding comes first, prefill takes the rest.

        `scouts` gives leads of another shape their rows.
        """
        self.prefixes = PrefixCache(arena, keeps=keeps_prefixes)
        self._scouts = scouts
        self._arena = arena
        self._step_rows = step_rows
        self._waiting: dict[Party, deque[Sequence]] = {}  # by client and user
        self._served: dict[Party, float] = {}  # of clients, and of their users
        self.running: list[Sequence] = []
        self.num_waiting = 0

    @property
    def sequences(self) -> Iterator[Sequence]:
        """Everything in the engine, running first."""
        yield from self.running
        for queue in self._waiting.values():
            yield from queue

    def add(self, sequence: Sequence) -> None:
        """Put a request at the end of its user's queue, and admit what can be."""
        for party in sequence.request.parties:
            if party not in self._served:
                peers = [n for other, n in self._served.items() if other[:-1] == party[:-1]]
                self._served[party] = min(peers, default=0)
        self._waiting.setdefault(party, deque()).append(sequence)
        self.num_waiting += 1
        self._admit()

    def remove(self, sequence: Sequence) -> None:
        """Forget a request, and free its rows if it has any."""
        client, user = sequence.request.parties
        if sequence.region_start is None:
            self._waiting[user].remove(sequence)
            self._drop_empty_queue(user)
            self.num_waiting -= 1
        else:
            self.running.remove(sequence)
            self.prefixes.end(sequence)
            if sequence.scout is not None and self._scouts is not None:
                self._scouts.end(sequence.scout)
        if user not in self._waiting and all(user not in s.request.parties for s in self.running):
            del self._served[user]
            if all(other[:-1] != client for other in self._served):
                del self._served[client]
        self._admit()

    def next_step(self) -> list[Part]:
        """Choose the next step's parts: every decoding request, then prefill chunks in turn."""
        decoding, prefilling = list[Sequence](), list[Sequence]()
        for sequence in self.running:
            if sequence.may_run:
                (decoding if sequence.num_pending == 1 else prefilling).append(sequence)
        decoding = self._share(decoding)
        parts = [_whole(sequence) for sequence in decoding]
        room = self._step_rows - sum(part.num_rows for part in parts)
        for sequence in sorted(prefilling, key=self._turn):
            # Who follows a scout may never compute the prompt: nobody is to wait for that.
            lends = sequence.scout is None
            if sequence.num_reused is None and not self.prefixes.begin(sequence, lends=lends):
                continue
            # One prefill always moves on, however many requests decode.
            least = 0 if len(parts) > len(decoding) else 1
            num_tokens = min(sequence.num_pending, max(room // len(sequence.due), least))
            if num_tokens == sequence.num_pending:
                parts.append(_whole(sequence))
            elif num_tokens > 0:
                parts.append(Part(sequence=sequence, num_tokens=num_tokens))
            else:
                continue
            room -= parts[-1].num_rows
        return self._charged(parts)

    def lead_step(self) -> list[Part]:
        """Choose a step of the scouts: those that have not asked who follows them."""
        parts, room = list[Part](), self._step_rows
        for sequence in self.running:
            scout = sequence.scout
            if scout is None or sequence.asks or self._scouts is None:
                continue
            if not sequence.said:
                scout.follow(sequence)
            if scout.num_reused is None:
                self._scouts.begin(scout, lends=False)
            num_tokens = min(scout.num_pending, room)
            if num_tokens > 0:
                parts.append(Part(sequence=scout, num_tokens=num_tokens))
                room -= num_tokens
        return self._charged(parts)

    def forget_prefixes(self) -> None:
        """Forget all rows that are only kept."""
        for prefixes in (self.prefixes, self._scouts):
            if prefixes is not None:
                prefixes.clear()

    def _charged(self, parts: list[Part]) -> list[Part]:
        for part in parts:
            self._charge(part.sequence, part.num_rows)
        return order_parts(parts)

    def _charge(self, sequence: Sequence, num_rows: int) -> None:
        for party in sequence.request.parties:
            self._served[party] += num_rows / sequence.request.client_weight

    @property
    def surplus(self) -> Sequence:
        """The newest request of the client that has most of them waiting: who goes if one must."""
        waiting: Counter[str] = Counter()
        for (client, _), queue in self._waiting.items():
            waiting[client] += len(queue)
        most = max(self._waiting, key=lambda user: (waiting[user[0]], len(self._waiting[user])))
        return self._waiting[most][-1]

    def _share(self, decoding: list[Sequence]) -> list[Sequence]:
        """Return those of `decoding` that take part in this step: each client's fair share."""
        if len(self.running) < 2 or len({s.request.parties for s in self.running}) < 2:
            return decoding
        rows: Counter[Party] = Counter()
        weights: dict[Party, float] = {}
        for sequence in self.running:
            for party in sequence.request.parties:
                rows[party] += sequence.num_lanes
                weights[party] = sequence.request.client_weight
        num_peers = Counter(party[:-1] for party in rows)
        if max(num_peers.values(), default=0) < 2:
            return decoding
        smallest: dict[Party, float] = {}
        for party, num in rows.items():
            above = party[:-1]
            smallest[above] = min(smallest.get(above, math.inf), num / weights[party])
        taken: Counter[Party] = Counter()

        def has_room(sequence: Sequence, party: Party) -> bool:
            above = party[:-1]
            most = max(_LEAST_ROWS, smallest[above] * weights[party])
            alone = num_peers[above] < 2
            return alone or not taken[party] or taken[party] + sequence.num_lanes <= most

        chosen = []
        # Those behind come first, so that a user's own requests move on alike.
        for sequence in sorted(decoding, key=lambda s: s.num_generated):
            if all(has_room(sequence, party) for party in sequence.request.parties):
                taken.update(dict.fromkeys(sequence.request.parties, sequence.num_lanes))
                chosen.append(sequence)
        return chosen

    def _is_spared(self, sequence: Sequence) -> bool:
        """Whether `sequence` would take the rows that its client leaves to others."""
        own = [s for s in self.running if s.request.client_id == sequence.request.client_id]
        held = sum(other.num_rows for other in own)
        most = self._arena.num_rows - self._arena.num_rows // _SPARED
        return bool(own) and held + sequence.num_rows > most

    def _turn(self, sequence: Sequence) -> tuple[bool, float, float]:
        """Return what requests go by, the least first."""
        client, user = sequence.request.parties
        return sequence.request.offline, self._served[client], self._served[user]

    def _admit(self) -> None:
        while able := [user for user, q in self._waiting.items() if not self._is_spared(q[0])]:
            user = min(able, key=lambda one: self._turn(self._waiting[one][0]))
            sequence = self._waiting[user][0]
            if not self._has_room(sequence):
                return
            # Charged in advance by a step, so that clients alternate when several are admitted.
            self._charge(sequence, sequence.num_lanes)
            self._waiting[user].popleft()
            self._drop_empty_queue(user)
            self.num_waiting -= 1
            self.running.append(sequence)

    def _has_room(self, sequence: Sequence) -> bool:
        """Give a request its rows, and its scout's; False where there is no room for both."""
        if not self.prefixes.admit(sequence):
            return False
        if sequence.scout is None or self._scouts is None or self._scouts.admit(sequence.scout):
            return True
        self.prefixes.end(sequence)
        return False

    def _drop_empty_queue(self, user: Party) -> None:
        if not self._waiting[user]:
            del self._waiting[user]


def _whole(sequence: Sequence) -> Part:
    """Return all that must still go through, and the guesses that are to be checked with it."""
    draft = sequence.draft
    return Part(sequence=sequence, num_tokens=sequence.num_pending + len(draft), draft=draft)
