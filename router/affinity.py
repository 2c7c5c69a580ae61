"""Which of several replicas of an engine gets a request: the one that has its prompt's start.

Engines keep the keys and values of prompts, each replica its own. So a later turn of a conversation
and whatever else begins alike go where that was computed, as long as that replica is not much
busier than the others; else, and for what is new, the less busy of two takes it (Ray Serve's own
rule, Mitzenmacher 2001). Ray's prefix-aware router does the same for texts of vLLM requests, by an
actor that is asked for every request; this one reads tokens and asks nobody. Each ingress replica
remembers what it has sent.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from models.engines.base import GenerationRequest

Place = TypeVar("Place")

_BLOCK_TOKENS = 32
_MOST_BLOCKS = 65_536
# How many more requests the replica that knows a prompt may have than the least busy one.
_MOST_AHEAD = 8


class Places(Generic[Place]):
    """Where prompts went: by chained hashes of blocks of their tokens, least recent out first."""

    def __init__(self) -> None:
        self._places: OrderedDict[int, Place] = OrderedDict()

    def find(self, tokens: Sequence[int]) -> Place | None:
        """Return where the longest known start of `tokens` went last; None: no block is known."""
        place = None
        for key in _chain(tokens):
            if key not in self._places:
                break
            place = self._places[key]
        return place

    def remember(self, tokens: Sequence[int], place: Place) -> None:
        """Note that `tokens` went to `place`."""
        for key in _chain(tokens):
            self._places[key] = place
            self._places.move_to_end(key)
        while len(self._places) > _MOST_BLOCKS:
            self._places.popitem(last=False)


class AffinityRouter(FIFOMixin, RequestRouter):
    """See the module's docstring; Ray Serve makes one for each handle of an engine."""

    def initialize_state(self, **_: object) -> None:
        """Begin without any memory; Ray Serve calls this."""
        self._places: Places[ReplicaID] = Places()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return whom to try, in order; of those tried together the least busy is taken."""
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [two]
        pending_request.routing_context.should_backoff = True
        known = self._places.find(_prompt(pending_request))
        replica = None if known is None else self.curr_replicas.get(known)
        if replica is None or self._is_busy(replica, candidate_replicas):
            return [two]
        return [[replica], two]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: object,  # noqa: ARG002 - Ray Serve's
    ) -> None:
        """Remember where a prompt went."""
        self._places.remember(_prompt(pending_request), replica_id)

    def _get_pending_request_matching_metadata(
        self, request_metadata: object = None
    ) -> PendingRequest | None:
        """Return whom a replica was chosen for, not the first who waits.

        The calls of one HTTP request have one id in Ray, by which it would find them, but metadata
        of their own.
        """
        waiting = self._pending_requests_to_fulfill
        own = (p for p in waiting if p.metadata is request_metadata and not p.future.done())
        return next(own, None)

    def _is_busy(self, replica: RunningReplica, others: list[RunningReplica]) -> bool:
        queues = [self.replica_queue_len_cache.get(r.replica_id) or 0 for r in (replica, *others)]
        return queues[0] - min(queues) > _MOST_AHEAD


def _prompt(pending_request: PendingRequest) -> Sequence[int]:
    """Return the tokens of a request; none of a call that is no request, or has only a text."""
    for value in pending_request.args:
        if isinstance(value, GenerationRequest):
            return value.prompt_tokens
    return ()


def _chain(tokens: Sequence[int]) -> Iterator[int]:
    """Yield the keys of the whole blocks of `tokens`: each block's with all before it."""
    digest = 0
    for end in range(_BLOCK_TOKENS, len(tokens) + 1, _BLOCK_TOKENS):
        digest = hash((digest, *tokens[end - _BLOCK_TOKENS : end]))
        yield digest
