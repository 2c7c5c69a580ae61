"""The llamacpp engine as the rest of Shoal sees it: llama.cpp's server behind our contract.

Requests take turns here (`Admission`), since llama.cpp's own queue knows no clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from models.answer_format import AnswerFormat
from models.card import ModelCard
from models.engines.answer_grammar import answer_grammar, compiled
from models.engines.answer_reader import AnswerReader
from models.engines.base import Chunk, EngineStats, GenerationRequest, Token
from models.engines.kind import EngineTraits
from models.engines.llamacpp import LlamacppOptions, slots
from models.engines.llamacpp.binding import Call, Event, Server
from models.engines.llamacpp.translate import MessageReader, raise_failure, score, write_body
from models.engines.requests import Admission, check_request
from models.engines.text import Vocabulary
from models.errors import EngineFailed, RequestError
from models.spec import EngineSpec

# So many answers that fail in a row may not be the requests' fault.
_SUSPICIOUS_FAILURES = 3


@dataclass(frozen=True, kw_only=True)
class _Running:
    """What exists between start and stop; `calls` are those that somebody reads."""

    server: Server
    vocabulary: Vocabulary
    admission: Admission
    threads: ThreadPoolExecutor
    calls: set[Call] = field(default_factory=set)


class LlamacppEngine:
    """One GGUF file inside llama.cpp; see `models.engines.base.Engine`.

    Each request is a call into the library on a thread of its own, which does nothing but wait for
    the next token; llama.cpp's own threads compute all requests together.
    """

    def __init__(
        self,
        spec: EngineSpec,
        options: LlamacppOptions,
        name: str,
        card: ModelCard,
        traits: EngineTraits,
    ) -> None:
        """Only remember; `start` loads llama.cpp and the model `name`."""
        self._spec = spec
        self._options = options
        self._name = name
        self._card = card
        self._traits = traits
        self._num_slots, self._context_tokens = slots(spec, options, card)
        self._num_tokens = 0
        self._failed_answers = 0  # in a row
        self._failure: EngineFailed | None = None
        self._trial: asyncio.Task[None] | None = None
        self._running: _Running | None = None

    @property
    def _form(self) -> AnswerFormat:
        return self._traits.answer_format(self.members)

    @property
    def members(self) -> tuple[str, ...]:
        """The one model."""
        return (self._name,)

    async def start(self) -> None:
        """Load the model. Raises `PoolError` where llama.cpp cannot run it."""
        self._failure, self._failed_answers = None, 0
        self._running = await asyncio.to_thread(self._load)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the answer to `request`; see the contract."""
        self.check_health()
        running = self._running
        assert running is not None, "check_health raises before start"
        max_tokens = await check_request(
            request,
            members=self.members,
            traits=self._traits,
            context_tokens=self._context_tokens,
            vocab_size=self._card.shape.vocab_size,
        )
        reader = AnswerReader(request, self._form, running.vocabulary)
        terminal = running.vocabulary.terminal
        grammar = answer_grammar(request, self._form, terminal, opened=reader.opened)
        if grammar is not None:
            # llama.cpp itself would answer freely where it cannot use a grammar.
            await compiled(running.vocabulary.grammars, grammar, request)
        body = write_body(
            request,
            max_tokens=max_tokens,
            context_tokens=self._context_tokens,
            grammar=grammar,
            marks=self._form.marks,
        )
        prompt = await self._score(request, running)
        async with aclosing(self._ask(request, running, body)) as events:
            async for chunk in self._read(events, MessageReader(request, running.vocabulary)):
                told = reader.read(chunk)
                yield replace(told, prompt=prompt) if prompt else told
                prompt = ()

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap. Of the cache it tells whose slots are taken."""
        if self._running is None:
            return EngineStats()
        admission = self._running.admission
        slot_bytes = self._spec.kv_memory_bytes // self._num_slots
        return EngineStats(
            running_requests=admission.num_running,
            queued_requests=admission.num_waiting,
            active_lanes=admission.num_running,
            kv_bytes_used=admission.num_running * slot_bytes,
            kv_bytes_total=self._num_slots * slot_bytes,
            generated_tokens_total=self._num_tokens,
            busy_seconds_total=admission.busy_s,
        )

    def check_health(self) -> None:
        """Raise `EngineFailed` if the engine cannot serve (any more)."""
        if self._running is None:
            raise EngineFailed(f"the engine {self._spec.name} is not running")
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Fail what runs and waits, and free everything; idempotent."""
        running, self._running = self._running, None
        if running is None:
            return
        stopped = EngineFailed(f"the engine {self._spec.name} was stopped")
        running.admission.close(stopped)
        for call in running.calls:
            call.fail(stopped)
        await asyncio.to_thread(running.threads.shutdown)
        await asyncio.to_thread(running.server.close)

    async def _ask(
        self, request: GenerationRequest, running: _Running, body: Mapping[str, Any]
    ) -> AsyncGenerator[Event, None]:
        """Yield llama.cpp's messages, once it is the turn of the request's client."""
        ticket = await running.admission.enter(request)
        call = Call(running.server, running.threads, body)
        call.done.add_done_callback(lambda _: running.admission.leave(ticket))
        running.calls.add(call)
        try:
            async for event in call.events():
                yield event
        finally:
            call.cancel()
            running.calls.discard(call)

    async def _score(self, request: GenerationRequest, running: _Running) -> tuple[Token, ...]:
        """Return the prompt's tokens with their likelihoods, where these are asked for."""
        num_top = request.sampling.prompt_logprobs
        if num_top is None:
            return ()
        return await score(
            request.prompt_tokens,
            partial(self._ask, request, running),
            running.vocabulary,
            vocab_size=self._card.shape.vocab_size,
            num_top=num_top,
        )

    async def _read(
        self, events: AsyncIterator[Event], reader: MessageReader
    ) -> AsyncIterator[Chunk]:
        try:
            async for event in events:
                chunk = reader.read(event)
                if chunk is not None:
                    self._num_tokens += len(chunk.tokens)
                    yield chunk
                if reader.stopped:
                    break
            yield reader.last()
        except EngineFailed:
            self._suspect()
            raise
        self._failed_answers = 0

    def _suspect(self) -> None:
        """Try the engine out where answers fail in a row: one client's requests may all do."""
        self._failed_answers += 1
        running = self._running
        if running is not None and self._failed_answers >= _SUSPICIOUS_FAILURES:
            self._failed_answers = 0
            if self._trial is None or self._trial.done():
                self._trial = asyncio.create_task(self._try_out(running))

    async def _try_out(self, running: _Running) -> None:
        """Ask for a token that nobody wants; the engine has failed if that fails, too."""
        prompt = [min(self._card.end_tokens, default=0)]
        call = Call(running.server, running.threads, {"prompt": prompt, "max_tokens": 1})
        running.calls.add(call)
        try:
            async for event in call.events():
                raise_failure(event)
        except (EngineFailed, RequestError) as error:
            self._failure = EngineFailed(
                f"the engine {self._spec.name}: every answer fails, whatever is asked: {error}"
            )
        finally:
            running.calls.discard(call)

    def _load(self) -> _Running:
        card = self._card
        return _Running(
            vocabulary=Vocabulary.read(
                card.path,
                size=card.shape.vocab_size,
                marks=self._form.marks,
                ends=card.end_tokens,
            ),
            server=Server(self._spec, self._options, card),
            admission=Admission(self._num_slots, max_queued=self._spec.max_queued_requests),
            threads=ThreadPoolExecutor(self._num_slots, thread_name_prefix="llamacpp"),
        )
