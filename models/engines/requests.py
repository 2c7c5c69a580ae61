"""What every engine checks of a request before it takes part in anything that others share, and the
queue of engines that have slots.

The API bounds its fields, and plans their numbers; an engine relies on neither, as one number out
of range would fail everybody in the same step.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from models.adapter import AdapterSource
from models.card import ModelCard
from models.engines.base import Evidence, GenerationRequest, Party, SamplingOptions
from models.engines.kind import EngineTraits
from models.errors import ContextOverflow, EngineFailed, EngineOverloaded, RequestError
from models.fair import FairThreads
from policies.plan import TEMPERATURES, Answer

# What each number of `SamplingOptions` may be, both ends included.
_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 2**31 - 1),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (1, 2**31 - 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-2, 100),
    "min_tokens": (0, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "top_logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
OPTIONAL: dict[str, Callable[[SamplingOptions], bool]] = {
    "repetition_penalty": lambda sampling: sampling.repetition_penalty != 1,
    "min_tokens": lambda sampling: sampling.min_tokens > 0,
    "stop_token_ids": lambda sampling: bool(sampling.stop_token_ids),
    "include_stop_str_in_output": lambda sampling: sampling.include_stop,
    "echo": lambda sampling: sampling.prompt_logprobs is not None,
    "top_k": lambda sampling: sampling.top_k is not None,
    "min_p": lambda sampling: sampling.min_p is not None,
    "ignore_eos": lambda sampling: sampling.ignore_eos,
}
"""Fields that not every engine honours (`EngineTraits.refuses`), and how a request asks for them.

`echo` stands for the log-probabilities of the prompt, which it shows.
"""
_MOST_BIAS = 100
_MOST_CONTRAST = 10  # as plans have it
_SLICE_TOKENS = 2**14  # a third of a millisecond
# One: every thread that holds the interpreter's lock is another that the event loop waits for.
_THREAD = FairThreads(1, "shoal-ids")


def fusion_of(answer: Answer) -> dict[str, Any]:
    """Return what a request says of its members and of how they are fused, as a plan has it."""
    evidence = None
    if answer.weighting in ("perplexity", "evidence"):
        evidence = Evidence(
            temperature=answer.temperature or 1.0,
            per_token=answer.weighting == "perplexity",
            update=answer.update,
        )
    return {
        "members": answer.members,
        # PackLLM has no prior.
        "weights": None if answer.weighting == "perplexity" else answer.weights,
        "rule": answer.rule,
        "gate": answer.gate,
        "contrast": answer.contrast,
        "evidence": evidence,
    }


def adapters_of(
    request: GenerationRequest, cards: Mapping[str, ModelCard]
) -> dict[str, AdapterSource]:
    """Return where the adapters among a request's members are: as it says, else as `cards` do."""
    own = {name: cards[name].adapter for name in request.members if name in cards}
    found = {name: adapter.origin for name, adapter in own.items() if adapter is not None}
    return {**found, **request.adapters}


@dataclass(eq=False, frozen=True)
class Ticket:
    """A request's place; `admitted` is set once it may run."""

    request: GenerationRequest
    admitted: asyncio.Future[None]


class Admission:
    """At most `num_slots` requests run and `max_queued` wait. Used on the event loop only.

    The next slot goes to the client with the fewest requests running for its weight, then to the
    one of its users with the fewest, among equals to the request that has waited longest; to those
    that are offline only where no other waits.
    """

    def __init__(self, num_slots: int, *, max_queued: int) -> None:
        self._num_slots = num_slots
        self._max_queued = max_queued
        self._waiting: list[Ticket] = []
        self._running: Counter[Party] = Counter()  # of clients, and of their users
        self._num_running = 0
        self._num_finished = 0
        self._busy_s = 0.0
        self._busy_since_s = 0.0

    @property
    def num_running(self) -> int:
        """How many requests hold a slot."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """How many requests wait for one."""
        return len(self._waiting)

    @property
    def busy_s(self) -> float:
        """For how long at least one request has been running."""
        return self._busy_s + (time.perf_counter() - self._busy_since_s if self._running else 0.0)

    @asynccontextmanager
    async def taken(self, request: GenerationRequest) -> AsyncIterator[None]:
        """Wait for a slot, and hold it; raises `EngineOverloaded`."""
        ticket = await self.enter(request)
        try:
            yield
        finally:
            self.leave(ticket)

    async def enter(self, request: GenerationRequest) -> Ticket:
        """Wait for a slot; raises `EngineOverloaded` where too many wait already."""
        ticket = Ticket(request, asyncio.get_running_loop().create_future())
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
        self._running.subtract(ticket.request.parties)
        self._running = +self._running  # forgets who runs nothing
        self._num_running -= 1
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
        while self._waiting and self.num_running < self._num_slots:
            ticket = min(self._waiting, key=lambda one: self._rank(one.request))
            if not self._running:
                self._busy_since_s = time.perf_counter()
            self._waiting.remove(ticket)
            self._running.update(ticket.request.parties)
            self._num_running += 1
            ticket.admitted.set_result(None)

    def _rank(self, request: GenerationRequest) -> tuple[bool, float, int]:
        client, user = request.parties
        return request.offline, self._running[client] / request.client_weight, self._running[user]


async def check_request(
    request: GenerationRequest,
    *,
    members: Sequence[str],
    traits: EngineTraits,
    context_tokens: int | None = None,
    vocab_size: int | None = None,
) -> int:
    """Return how many tokens the answer may have, at most `max_tokens` of the request.

    `members` are the engine's. `context_tokens` is what prompt and answer may have together; None:
    not known. `vocab_size` None: another server makes tokens of the prompt. Other work of the event
    loop runs while long prompts are read. Raises `RequestError` that names the field, its value and
    what is allowed, or `ContextOverflow`.
    """
    _check_members(request, members, traits)
    _check_fusion(request, traits)
    told = request.encoding and request.encoding.kind
    if told is None and traits.encodes.keys() & request.members:
        raise RequestError(f"{', '.join(request.members)} writes no answers", "model")
    if told is not None:
        if any(told not in traits.encodes.get(name, ()) for name in request.members):
            raise RequestError(f"{', '.join(request.members)} cannot tell a {told}", "model")
        return request.sampling.max_tokens
    check_sampling(request.sampling, traits)
    await _check_tokens(request, vocab_size)
    if request.tools is not None and not traits.calls(request.members):
        raise RequestError(f"tools: {', '.join(request.members)} cannot call any", "tools")
    if context_tokens is None:
        return request.sampling.max_tokens
    room = context_tokens - len(request.prompt_tokens)
    if room < 1:
        raise ContextOverflow(
            f"The maximum context length of {', '.join(request.members)} is {context_tokens} "
            f"tokens, answer included, but the prompt has {len(request.prompt_tokens)}.",
            _prompt_field(request),
        )
    return min(request.sampling.max_tokens, room)


def relative_weights(request: GenerationRequest) -> tuple[float, ...]:
    """Return the weights that a checked request asks for, one per member; they sum to one."""
    weights = request.weights or (1.0,) * len(request.members)
    return tuple(weight / sum(weights) for weight in weights)


def _check_members(
    request: GenerationRequest, members: Sequence[str], traits: EngineTraits
) -> None:
    for name in request.members:
        if name not in members or request.members.count(name) > 1:
            raise RequestError(
                f"members: {name!r} is unknown or named twice; allowed are {', '.join(members)}",
                "model",
            )
    if not request.members:
        raise RequestError("members: at least one is needed", "model")
    if len(request.members) > 1 and not traits.fuses:
        raise RequestError(
            f"members: {', '.join(request.members)} cannot be fused by this engine", "model"
        )


def _check_fusion(request: GenerationRequest, traits: EngineTraits) -> None:
    weights, evidence = request.weights, request.evidence
    if weights is not None and (
        len(weights) != len(request.members)
        or not all(weight >= 0 for weight in weights)
        or not 0 < sum(weights) < math.inf
    ):
        raise RequestError(
            f"weights {list(weights)}: one finite number >= 0 is needed for each of the "
            f"{len(request.members)} members, and not all may be zero"
        )
    if len(request.members) > 1 and request.rule not in traits.rules:
        raise RequestError(
            f"the rule {request.rule!r} is not known to this engine; allowed are "
            f"{', '.join(traits.rules)}"
        )
    _check_range("gate", request.gate, 0, 1)
    _check_range("contrast", request.contrast, 0, _MOST_CONTRAST)
    if evidence is not None:
        _check_range("evidence.temperature", evidence.temperature, *TEMPERATURES)
        if evidence.update and not traits.updates_evidence:
            raise RequestError("evidence.update: weights do not follow the answer in this engine")
    if request.rule != "contrastive":
        return
    if len(request.members) not in (2, 3):
        raise RequestError(
            "the rule 'contrastive' needs two members (expert, anti-expert) or three "
            f"(base, expert, anti-expert), got {len(request.members)}"
        )
    if weights is not None or evidence is not None:
        raise RequestError("the rule 'contrastive' takes no weights; see contrast")


def check_sampling(sampling: SamplingOptions, traits: EngineTraits) -> None:
    """Raise `RequestError` for options out of range, or that such an engine cannot honour."""
    for name, (least, most) in _RANGES.items():
        value = getattr(sampling, name)
        if value is not None:
            _check_range(name, value, least, most)
    for token, bias in sampling.logit_bias.items():
        _check_range(f"logit_bias.{token}", bias, -_MOST_BIAS, _MOST_BIAS, param="logit_bias")
    if "" in sampling.stop:
        raise RequestError("stop: an empty string is not allowed", "stop")
    if sampling.top_logprobs is not None and not traits.logprobs:
        raise RequestError("logprobs: this engine returns none", "logprobs")
    for field in traits.refuses:
        if OPTIONAL[field](sampling):
            raise RequestError(f"{field}: this engine cannot honour it", field)
    structure = sampling.structure
    if structure is not None and structure.kind not in traits.structures:
        raise RequestError(
            f"{structure.field}: this engine holds no answer to a {structure.kind}", structure.field
        )


async def _check_tokens(request: GenerationRequest, vocab_size: int | None) -> None:
    told = request.messages or request.text if vocab_size is None else None
    if not request.prompt_tokens and not told:
        raise RequestError("the prompt is empty", _prompt_field(request))
    if vocab_size is None:
        return
    for what, tokens in (
        (_prompt_field(request), request.prompt_tokens),
        ("logit_bias", request.sampling.logit_bias),
        ("stop_token_ids", request.sampling.stop_token_ids),
    ):
        if len(tokens) <= _SLICE_TOKENS:
            unknown = _outside(vocab_size, tokens)
        else:
            loop = asyncio.get_running_loop()
            unknown = await loop.run_in_executor(_THREAD, _outside, vocab_size, tokens)
        if unknown is not None:
            raise RequestError(
                f"{what}: the token id {unknown} is outside of the vocabulary of {vocab_size}", what
            )


def _outside(bound: int, tokens: Iterable[int]) -> int | None:
    """Return one of `tokens` that is not in [0, bound); None where all are.

    It goes by slices: others have the lock in between.
    """
    left = iter(tokens)
    while piece := tuple(islice(left, _SLICE_TOKENS)):
        for token in (min(piece), max(piece)):
            if not 0 <= token < bound:
                return token
    return None


def _prompt_field(request: GenerationRequest) -> str:
    return "prompt" if request.messages is None else "messages"


def _check_range(
    name: str, value: float, least: float, most: float, *, param: str | None = None
) -> None:
    """Refuse what lies outside, and what is no number."""
    if not least <= value <= most:
        raise RequestError(f"{name}: {value} is not in [{least:g}, {most:g}]", param or name)
