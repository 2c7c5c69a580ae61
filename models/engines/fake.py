"""A scripted engine: answers, delays and failures as told, without weights.

For tests and load tests of everything around an engine, and to try a pool file or a client
without a model. It reads byte tokens (`models.tokenizer.ByteTokenizer`), writes one byte per
token, and is deterministic: it does not sample.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace

from pydantic import Field

from models.engines.answer_reader import AnswerReader
from models.engines.base import (
    Chunk,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Token,
    TopLogprob,
)
from models.engines.kind import EngineKind, EngineTraits, formats_of
from models.engines.requests import Admission, check_request
from models.engines.text import TextStream
from models.errors import EngineFailed, EngineOverloaded, PoolError
from models.spec import EngineSpec, Model
from models.tokenizer import ByteTokenizer
from policies.kinds import Strict


class Script(Strict):
    """How one model behaves.

    Calls and thoughts are read off an answer's text where the model's keys `tools` and `reasoning`
    say how they are written. Successive requests take the `answers` in turn; with none, the last
    message is echoed. Each token carries `logprob` and `entropy`. With `fail_after_tokens` a
    request fails after that many tokens (0: at once), with `refuse` it is turned away as if the
    queue were full; `num_failures` limits either to the first so many requests.
    """

    answers: tuple[str, ...] = ()
    time_to_first_token_s: float = Field(0, ge=0)
    token_latency_s: float = Field(0, ge=0)
    logprob: float = Field(-0.1, le=0)
    entropy: float | None = Field(None, ge=0)
    fail_after_tokens: int | None = Field(None, ge=0)
    refuse: bool = False
    num_failures: int | None = Field(None, ge=0)


class FakeOptions(Script):
    """The engine's `options`: a script for every model, and exceptions by model name.

    At most `max_running_requests` run at once; the rest wait in the queue that the engine's
    `max_queued_requests` bounds.
    """

    models: dict[str, Script] = Field(default_factory=dict)
    context_tokens: int = Field(8192, ge=1)
    max_running_requests: int = Field(256, ge=1)


class FakeEngine:
    """Plays scripts; see `Script` and `FakeOptions`. A fused request plays its first member's."""

    def __init__(
        self,
        *,
        members: Sequence[str],
        options: FakeOptions,
        max_queued_requests: int,
        traits: EngineTraits | None = None,
    ) -> None:
        self._members = tuple(members)
        self._traits = traits or EngineTraits()
        self._options = options
        self._slots = Admission(options.max_running_requests, max_queued=max_queued_requests)
        self._requests_of = {name: itertools.count() for name in members}
        self._lanes = 0
        self._generated_tokens = 0
        self._stopped = False

    @property
    def members(self) -> tuple[str, ...]:
        """The models this engine plays."""
        return self._members

    async def start(self) -> None:
        """Nothing to load."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Play the script of the request's first member, one chunk per token."""
        max_tokens = await self._check(request)
        script = self._options.models.get(request.members[0], self._options)
        turn = next(self._requests_of[request.members[0]])
        scripted_failure = script.num_failures is None or turn < script.num_failures
        if script.refuse and scripted_failure:
            raise EngineOverloaded("the script refuses this request", 1.0)
        async with self._slots.taken(request):
            self._lanes += len(request.members)
            try:
                fail_after_tokens = script.fail_after_tokens if scripted_failure else None
                reader = AnswerReader(request, self._traits.answer_format(request.members), None)
                async for chunk in self._play(request, script, turn, fail_after_tokens, max_tokens):
                    yield reader.read(chunk)
            finally:
                self._lanes -= len(request.members)

    def stats(self) -> EngineStats:
        """Count what runs and waits."""
        return EngineStats(
            running_requests=self._slots.num_running,
            queued_requests=self._slots.num_waiting,
            active_lanes=self._lanes,
            generated_tokens_total=self._generated_tokens,
        )

    def check_health(self) -> None:
        """Raise `EngineFailed` once stopped."""
        if self._stopped:
            raise EngineFailed("the fake engine is stopped")

    async def stop(self) -> None:
        """Fail what runs at its next token."""
        self._stopped = True

    async def _check(self, request: GenerationRequest) -> int:
        self.check_health()
        return await check_request(
            request,
            members=self._members,
            traits=self._traits,
            context_tokens=self._options.context_tokens,
            vocab_size=ByteTokenizer().vocab_size,
        )

    async def _play(
        self,
        request: GenerationRequest,
        script: Script,
        turn: int,
        fail_after_tokens: int | None,
        max_tokens: int,
    ) -> AsyncIterator[Chunk]:
        sampling = request.sampling
        answer = script.answers[turn % len(script.answers)] if script.answers else _last(request)
        stream = TextStream(sampling.stop, include_stop=sampling.include_stop)
        await asyncio.sleep(script.time_to_first_token_s)
        for index, token_id in enumerate(_ids(answer, forever=sampling.ignore_eos)):
            if index == fail_after_tokens:
                raise EngineFailed(f"the script fails after {index} tokens")
            self.check_health()
            if index:
                await asyncio.sleep(script.token_latency_s)
            self._generated_tokens += 1
            text = stream.push(_raw(token_id))
            finish: FinishReason | None = None
            if stream.stopped or token_id == ByteTokenizer.END_OF_TURN:
                finish = "stop"
            elif index + 1 == max_tokens:
                finish = "length"
            if finish and not stream.stopped:
                text += stream.finish()
            token = _token(token_id, script, sampling.top_logprobs)
            yield Chunk(
                text=text,
                tokens=(
                    token if sampling.logprobs else replace(token, logprob=None, entropy=None),
                ),
                finish_reason=finish,
                stop=stream.stop,
                prompt=() if index else _prompt(request, script),
            )
            if finish:
                return


def _ids(answer: str, *, forever: bool) -> Iterable[int]:
    data = answer.encode()
    return itertools.cycle(data or b" ") if forever else [*data, ByteTokenizer.END_OF_TURN]


def _prompt(request: GenerationRequest, script: Script) -> tuple[Token, ...]:
    """Return the prompt's tokens as scored, if that was asked for."""
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return ()
    first, *rest = request.prompt_tokens
    start = replace(_token(first, script, 0), logprob=None)
    return (start, *(_token(token_id, script, num_top) for token_id in rest))


def _last(request: GenerationRequest) -> str:
    """Return the content of the conversation's last turn, or a prompt without turns as it is."""
    ids = request.prompt_tokens
    if ByteTokenizer.END_OF_TURN not in ids:
        return ByteTokenizer().decode(ids)
    end = len(ids) - 1 - ids[::-1].index(ByteTokenizer.END_OF_TURN)
    start = end
    while start > 0 and ids[start - 1] != ByteTokenizer.END_OF_TURN:
        start -= 1
    return ByteTokenizer().decode(ids[start:end]).partition("\n")[2]


def _token(token_id: int, script: Script, top_logprobs: int | None) -> Token:
    vocab_size = ByteTokenizer().vocab_size
    others = [(token_id + step) % vocab_size for step in range(top_logprobs or 0)]
    return Token(
        token_id=token_id,
        raw=_raw(token_id),
        logprob=script.logprob,
        top=tuple(
            TopLogprob(token_id=other, raw=_raw(other), logprob=script.logprob - rank)
            for rank, other in enumerate(others)
        ),
        entropy=script.entropy,
    )


def _raw(token_id: int) -> bytes:
    return b"" if token_id == ByteTokenizer.END_OF_TURN else bytes([token_id])


def _inspect(spec: EngineSpec, options: FakeOptions, models: Sequence[Model]) -> EngineTraits:
    names = [model.name for model in models]
    for name in options.models:
        if name not in names:
            raise PoolError(
                f"engines.{spec.name}.options.models: {name!r} is unknown; "
                f"allowed are {', '.join(names)}"
            )
    return EngineTraits(context_tokens=options.context_tokens, formats=formats_of(models))


def _create(spec: EngineSpec, options: FakeOptions, models: Sequence[Model]) -> FakeEngine:
    return FakeEngine(
        members=[model.name for model in models],
        options=options,
        max_queued_requests=spec.max_queued_requests,
        traits=_inspect(spec, options, models),
    )


KIND = EngineKind(
    options=FakeOptions,
    inspect=_inspect,
    create=_create,
    beside_answers=frozenset({"time_to_first_token_s", "token_latency_s", "max_running_requests"}),
)
