"""The stacked engine as the rest of Shoal sees it: the event loop's side of the engine's thread."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from models.card import ModelCard
from models.engines.answer_grammar import answer_grammar, compiled
from models.engines.answer_reader import AnswerReader
from models.engines.base import Chunk, EngineStats, GenerationRequest
from models.engines.kind import EngineTraits
from models.engines.requests import adapters_of, check_request, relative_weights
from models.engines.stacked import StackedOptions
from models.engines.stacked.adapters import Adapters
from models.engines.stacked.cache import PrefixCache, row_bytes
from models.engines.stacked.drafts import Drafts, MemberDrafts, Ngrams, StepCosts
from models.engines.stacked.fusion import LaneWeights, contrastive_powers
from models.engines.stacked.lead import lead_suffices, scout_of
from models.engines.stacked.loop import Loop
from models.engines.stacked.matrices import Pack, as_int4, as_int8, fastest
from models.engines.stacked.runner import Runner
from models.engines.stacked.sampler import Grammar, SamplerState
from models.engines.stacked.scheduler import Scheduler
from models.engines.stacked.sequence import Outcome, Sequence
from models.engines.stacked.threads import in_own_thread
from models.engines.text import TextStream, Vocabulary
from models.errors import EngineFailed, PoolError, RequestError
from models.spec import EngineSpec

_PACKS: Mapping[str, Pack[Any]] = {"int8": as_int8, "int4": as_int4}


@dataclass(frozen=True, kw_only=True)
class _Running:
    """What exists between start and stop."""

    loop: Loop
    readers: set[asyncio.Queue[Outcome]]
    vocabulary: Vocabulary
    context_tokens: int
    num_rows: int
    row_bytes: int
    guests: Runner | None
    adapters: Adapters


class StackedEngine:
    """M same-shaped checkpoints as one model; see `models.engines.base.Engine`.

    On CPU it is tested against transformers. On CUDA it runs the same steps with grouped products
    and padded attention, decoding in bfloat16 as CUDA graphs (`graphs`). Nobody has run that yet:
    `tests/gpu` waits for a device.
    """

    def __init__(
        self,
        spec: EngineSpec,
        members: Mapping[str, ModelCard],
        traits: EngineTraits,
        options: StackedOptions,
        guests: Mapping[str, ModelCard],
    ) -> None:
        """Only remember; `start` loads. `guests`, of another shape, draft for members or lead."""
        self._spec = spec
        self._traits = traits
        self._options, self._guests = options, dict(guests)
        self._cards = dict(members)
        self._bases = [name for name, card in members.items() if card.adapter is None]
        self._base = self._cards[self._bases[0]]
        self._vocab_size = self._base.shape.vocab_size
        self._running: _Running | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The models this engine holds, in the pool's order."""
        return tuple(self._cards)

    async def start(self) -> None:
        """Load the weights, run a first step, and start the engine's thread."""
        runner, guests, vocabulary = await in_own_thread(self._load)
        keeps = self._options.prefix_cache
        scouts = None if guests is None else PrefixCache(guests.arena, keeps=keeps)
        scheduler = Scheduler(
            runner.arena,
            step_rows=self._options.step_rows,
            keeps_prefixes=keeps,
            scouts=scouts,
        )
        drafts = await in_own_thread(self._drafts, runner, scheduler.prefixes, guests, scouts)
        loop = Loop(
            runner,
            scheduler,
            vocabulary=vocabulary,
            drafts=drafts,
            scouts=guests,
            max_queued_requests=self._spec.max_queued_requests,
            stream_interval_s=self._options.stream_interval_ms / 1e3,
            event_loop=asyncio.get_running_loop(),
        )
        loop.start()
        self._running = _Running(
            loop=loop,
            readers=set(),
            vocabulary=vocabulary,
            context_tokens=runner.architecture.context_tokens,
            num_rows=runner.arena.num_rows,
            row_bytes=runner.arena.row_bytes,
            guests=guests,
            adapters=Adapters(
                partial(runner.prepare, self._base),
                base=self._base,
                most=self._options.max_adapters,
                between_steps=loop.between_steps,
                forget=scheduler.prefixes.forget,
            ),
        )
        own = {name: card.adapter for name, card in self._cards.items()}
        with await self._running.adapters.hold(
            {name: adapter.origin for name, adapter in own.items() if adapter is not None}
        ):
            pass  # loaded for whoever asks first

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the answer to `request`; see the contract."""
        self.check_health()
        running = self._running
        assert running is not None, "check_health raises before start"
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        for name in request.adapters.keys() - self._cards.keys():
            self._adopt(name)
        with await running.adapters.hold(adapters_of(request, self._cards)) as adapters:
            sequence = await self._sequence(request, running, adapters, outcomes)
            form, vocabulary = self._traits.answer_format(request.members), running.vocabulary
            reader = AnswerReader(request, form, vocabulary)
            grammar = answer_grammar(request, form, vocabulary.terminal, opened=reader.opened)
            if grammar is not None:
                matcher = await compiled(vocabulary.grammars, grammar, request)
                sequence.sampler.grammar = Grammar(matcher)
            running.readers.add(outcomes)
            running.loop.submit(sequence)
            try:
                while True:
                    outcome = await outcomes.get()
                    if not isinstance(outcome, Chunk):
                        raise outcome
                    yield reader.read(outcome)
                    if outcome.finish_reason is not None:
                        return
            finally:
                running.readers.discard(outcomes)
                running.loop.cancel(sequence)

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap."""
        return self._running.loop.stats() if self._running else EngineStats()

    def check_health(self) -> None:
        """Raise `EngineFailed` if the engine cannot serve (any more)."""
        if self._running is None:
            raise EngineFailed(f"the engine {self._spec.name} is not running")
        loop = self._running.loop
        if loop.failure is not None:
            raise loop.failure
        if not loop.is_alive():
            raise EngineFailed(f"the thread of the engine {self._spec.name} has died")
        if loop.step_s > self._options.step_timeout_s:
            raise EngineFailed(
                f"a step of the engine {self._spec.name} hangs: it has taken longer than "
                f"options.step_timeout_s, {self._options.step_timeout_s:g}"
            )

    async def stop(self) -> None:
        """Fail what runs, end the thread and free the memory; idempotent.

        A thread whose step hangs cannot be ended. Its readers are not left waiting, and it ends by
        itself should the step ever return.
        """
        running, self._running = self._running, None
        if running is None:
            return
        loop = running.loop
        loop.request_stop()
        await asyncio.to_thread(loop.join, max(0.0, self._options.step_timeout_s - loop.step_s))
        if loop.is_alive():
            for outcomes in running.readers:
                outcomes.put_nowait(EngineFailed(f"a step of the engine {self._spec.name} hangs"))

    def _load(self) -> tuple[Runner, Runner | None, Vocabulary]:
        guests = self._runner(list(self._guests.values())) if self._guests else None
        runner = self._runner([self._cards[name] for name in self._bases], scouts=guests)
        vocabulary = Vocabulary.read(
            self._base.path,
            size=self._vocab_size,
            marks=self._traits.marks,
            ends=frozenset().union(*(card.end_tokens for card in self._cards.values())),
        )
        return runner, guests, vocabulary

    def _adopt(self, name: str) -> None:
        """Take a name in that an adapter of the base got since the pool was read."""
        self._cards[name] = self._base
        self._traits = self._traits.adopting(name, self._bases[0])

    def _runner(self, cards: Seq[ModelCard], scouts: Runner | None = None) -> Runner:
        """Load `cards`, and run a first step. Guests share the cache's bytes, row for row."""
        device = _device(self._spec)
        dtype = _dtype(self._spec, device)
        if device.type == "cuda" and self._spec.dtype in _PACKS and len(cards) > 1:
            raise PoolError(
                f"engines.{self._spec.name}.dtype: {self._spec.dtype} on CUDA is for one "
                f"checkpoint and its adapters, not for {len(cards)}; try bfloat16"
            )
        cached = [self._base, *list(self._guests.values())[:1]]
        shares = [row_bytes(card.shape, dtype) for card in cached]
        own = row_bytes(cards[0].shape, dtype)
        drafts = self._options.draft is not None or bool(self._guests)
        plain = fastest(device, dtype, several_rows=drafts)
        runner = Runner(
            cards,
            kv_memory_bytes=self._spec.kv_memory_bytes * own // sum(shares),
            device=device,
            dtype=dtype,
            pack=_PACKS.get(self._spec.dtype, plain),
            num_threads=self._options.num_threads,
            scouts=scouts,
        )
        with torch.inference_mode():
            runner.try_out()
        return runner

    @torch.inference_mode()
    def _drafts(
        self,
        runner: Runner,
        prefixes: PrefixCache,
        guests: Runner | None,
        scouts: PrefixCache | None,
    ) -> Drafts | None:
        """Return who guesses, having measured what steps take."""
        draft = self._options.draft
        if draft is None:
            return None
        costs = StepCosts.measured(runner, len(self._bases))
        if draft == "ngram":
            return Drafts(Ngrams(), costs)
        member, guess_s = None, costs.one_s
        if draft != "heaviest" and draft.member in self._guests:
            assert guests is not None and scouts is not None, "there are guests"
            runner, prefixes = guests, scouts
            member = list(self._guests).index(draft.member)
            guess_s = StepCosts.measured(runner, len(self._guests)).one_s
        elif draft != "heaviest":
            member = self._bases.index(draft.member)
        most = self._options.step_rows
        return Drafts(MemberDrafts(runner, prefixes, member, guess_s=guess_s, most=most), costs)

    async def _sequence(
        self,
        request: GenerationRequest,
        running: _Running,
        adapters: Mapping[str, int],
        outcomes: asyncio.Queue[Outcome],
    ) -> Sequence:
        scout, context_tokens = self._scout(request), running.context_tokens
        if running.guests is not None and scout is not None:
            context_tokens = min(context_tokens, running.guests.architecture.context_tokens)
        max_new_tokens = await check_request(
            request,
            members=self.members if scout is None else (request.members[0], *self.members),
            traits=self._traits,
            context_tokens=context_tokens,
            vocab_size=self._vocab_size,
        )
        members, weights, lane_of = self._lanes(request, adapters)
        cards = {**self._guests, **self._cards}
        sampling = request.sampling
        used = [
            name for name, lane in zip(request.members, lane_of, strict=True) if lane is not None
        ]
        end_tokens = frozenset().union(*(cards[name].end_tokens for name in used))
        ends = () if sampling.ignore_eos else end_tokens
        sequence = Sequence(
            request=request,
            members=members,
            weights=LaneWeights(weights, request.evidence),
            lane_of=lane_of,
            lead_alone=scout is None and len(members) > 1 and lead_suffices(request),
            end_tokens=end_tokens,
            tokens=list(request.prompt_tokens),
            max_new_tokens=max_new_tokens,
            sampler=SamplerState(
                sampling,
                None,
                random.Random(sampling.seed),
                prompt=request.prompt_tokens,
                ends=sorted({*ends, *sampling.stop_token_ids}),
            ),
            text=TextStream(sampling.stop, include_stop=sampling.include_stop),
            send=outcomes.put_nowait,
        )
        num_rows = running.num_rows
        if running.guests is not None and scout is not None:
            sequence.scout = scout_of(sequence, scout)
            num_rows = min(num_rows, running.guests.arena.num_rows)
        if sequence.num_rows > num_rows:
            raise RequestError(
                f"prompt and answer need {sequence.num_rows * running.row_bytes} bytes of "
                f"key/value cache, but the engine has {num_rows * running.row_bytes}; "
                "lower max_tokens",
                "max_tokens",
            )
        return sequence

    def _lanes(
        self, request: GenerationRequest, adapters: Mapping[str, int]
    ) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int | None, ...]]:
        """Return the members to run, as ascending indices, and their weights, summing to one.

        Also which of these lanes each member named by the request is; of `adapters` this says which
        member of the step each is. Members of zero weight need no lane, but for one that leads; one
        that runs alone comes first. A lead that is a guest has no lane but a weight, the first.
        """
        scout = self._scout(request)
        indices = [
            adapters[name] if name in adapters else self._bases.index(name)
            for name in request.members[0 if scout is None else 1 :]
        ]
        if scout is not None:
            return _following(indices, relative_weights(request))
        lanes = dict(zip(indices, relative_weights(request), strict=True))
        if request.rule == "contrastive":
            lanes = dict(zip(lanes, contrastive_powers(len(lanes), request.contrast), strict=True))
        lead = next(iter(lanes)) if request.rule in ("gated", "contrastive") else None
        used = sorted(member for member, weight in lanes.items() if weight != 0 or member == lead)
        if lead_suffices(request):
            used.sort(key=lambda member: member != lead)
        lane_of = tuple(used.index(member) if member in used else None for member in lanes)
        return tuple(used), tuple(lanes[member] for member in used), lane_of

    def _scout(self, request: GenerationRequest) -> int | None:
        """Return which guest leads `request`; None where none does, as it names only members."""
        lead, *others = request.members or ("",)
        if request.rule != "gated" or not others or lead not in self._traits.leads:
            return None
        if request.evidence is not None:
            raise RequestError(f"evidence: {lead} leads, which does not go with it", "evidence")
        return list(self._guests).index(lead)


def _following(
    members: Seq[int], weights: Seq[float]
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int | None, ...]]:
    """Return what `_lanes` does for `members` who follow a guest, whose weight is the first."""
    lead, *shares = weights
    weight_of = dict(zip(members, shares, strict=True))
    used = sorted(member for member, weight in weight_of.items() if weight) or [min(members)]
    places = {member: 1 + lane for lane, member in enumerate(used)}
    return (
        tuple(used),
        (lead, *(weight_of[member] for member in used)),
        (0, *(places.get(member) for member in members)),
    )


def _device(spec: EngineSpec) -> torch.device:
    if spec.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if spec.device != "cpu" and not torch.cuda.is_available():
        raise PoolError(f"engines.{spec.name}.device: {spec.device} is not there; try auto or cpu")
    return torch.device(spec.device)


def _dtype(spec: EngineSpec, device: torch.device) -> torch.dtype:
    if spec.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if spec.dtype in _PACKS:  # this is of everything but the matrices
        if device.type == "cpu":
            return torch.float32
        if spec.dtype == "int4":
            raise PoolError(f"engines.{spec.name}.dtype: int4 is for CPU; try int8 or bfloat16")
        return torch.bfloat16
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype
