"""The engine of encoders: it reads texts, admits requests and reports; an `Encoder` computes.

Whatever runs one (transformers here, llama.cpp, vLLM), inputs are cut, counted and refused alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from models.engines.base import Chunk, Encodes, EngineStats, GenerationRequest, of_length_one
from models.errors import ContextOverflow, EngineFailed, EngineOverloaded, RequestError
from models.spec import EngineSpec
from models.tokenizer_json import encode_all

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import Encoding

_OFFLINE_TEXTS = 16  # at a time


class TextReader:
    """Makes token ids of texts, and of texts with a query. Its methods may run on any thread."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        max_tokens: int,
        prompt: str = "",
        cross: bool = False,
    ) -> None:
        """Texts have at most `max_tokens` and begin with the `prompt`; `cross`: they are pairs."""
        self.max_tokens = max_tokens
        self._prompt = prompt
        self._whole = tokenizer
        # Cuts so that the special tokens stay; of pairs the query does, too.
        self._cut = type(tokenizer).from_str(tokenizer.to_str())
        self._cut.enable_truncation(max_tokens, strategy="only_second" if cross else "only_first")

    def rows(self, texts: Sequence[str | tuple[int, ...]], *, cut: bool) -> list[list[int]]:
        """Return the ids of `texts`; with `cut`, of as many tokens as the model holds.

        Raises `ContextOverflow` for one that is too long, `RequestError` for ids it does not know,
        and for a text that it cannot encode.
        """
        tokenizer = self._cut if cut else self._whole
        prompts = [self._prompt + text for text in texts if isinstance(text, str)]
        encoded = iter(encode_all(tokenizer, prompts))
        found = [next(encoded).ids if isinstance(text, str) else [*text] for text in texts]
        vocab_size = tokenizer.get_vocab_size()
        for index, ids in enumerate(found):
            if not ids or not 0 <= min(ids) <= max(ids) < vocab_size:
                raise RequestError(
                    f"input[{index}]: it is empty, or an id is outside of the vocabulary of "
                    f"{vocab_size}",
                    "input",
                )
            if len(ids) > self.max_tokens and not cut:
                raise ContextOverflow(
                    f"This model's maximum context length is {self.max_tokens} tokens, but "
                    f"input[{index}] has {len(ids)}.",
                    "input",
                )
        return [ids[: self.max_tokens] for ids in found]

    def pairs(self, query: str, texts: Sequence[str]) -> list[Encoding]:
        """Return `query` with each of `texts`, which are cut to the room that it leaves.

        Raises `RequestError` where it leaves none.
        """
        try:
            return self._cut.encode_batch([(query, text) for text in texts])
        except Exception as error:  # the library raises bare exceptions
            raise RequestError(f"query: it leaves no room for a text: {error}", "query") from None


class Encoder(Protocol):
    """One loaded model: vectors, or scores of texts that are read together with a query."""

    reader: TextReader

    async def vectors(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return a vector for each row of ids, [num_rows, num_dimensions], of any length."""
        ...

    async def scores(self, query: str, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
        """Return how well each of `texts` answers, [num_texts] in (0, 1), and the tokens read."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class EncoderEngine:
    """One encoder; see `models.engines.base.Engine`.

    `encodes` is what it can tell; without "vector" it reads texts with their query. `load` brings
    the model, and computes `num_at_once` requests at once. Offline texts are read a few at a time,
    while nobody waits for others.
    """

    def __init__(
        self,
        spec: EngineSpec,
        name: str,
        encodes: Sequence[Encodes],
        load: Callable[[], Awaitable[Encoder]],
        *,
        num_at_once: int = 1,
    ) -> None:
        """Only remember; `start` loads the model `name`."""
        self._spec = spec
        self._name = name
        self._encodes = encodes
        self._load = load
        self._num_at_once = num_at_once
        self._encoder: Encoder | None = None
        self._num_running = 0
        self._num_waited_for = 0
        self._nobody_waits = asyncio.Event()
        self._nobody_waits.set()
        self._busy_s = 0.0
        self._busy_since_s = 0.0

    @property
    def members(self) -> tuple[str, ...]:
        """The one model."""
        return (self._name,)

    async def start(self) -> None:
        """Load the model. Raises `PoolError`, or `EngineFailed`."""
        self._encoder = await self._load()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Yield one chunk with a row per input; see the contract."""
        self.check_health()
        encoder, asked = self._encoder, request.encoding
        assert encoder is not None, "check_health raises before start"
        if asked is None or asked.kind not in self._encodes:
            told = "a text" if asked is None else f"a {asked.kind}"
            raise RequestError(
                f"{self._name} is an encoder that cannot answer with {told}", "model"
            )
        if self._num_running >= self._num_at_once + self._spec.max_queued_requests:
            raise EngineOverloaded(f"{self._num_running} requests run or wait already", 1.0)
        self._begin(offline=request.offline)
        try:
            if "vector" in self._encodes:
                texts = asked.inputs if asked.query is None else (asked.query, *asked.inputs)
                ids = await asyncio.to_thread(encoder.reader.rows, texts, cut=asked.cut)
                vectors = await (
                    self._in_pauses(encoder, ids) if request.offline else encoder.vectors(ids)
                )
                rows, num_tokens = of_length_one(vectors), sum(map(len, ids))
                if asked.query is not None:
                    rows = rows[1:] @ rows[:1].T
            else:
                documents = [text for text in asked.inputs if isinstance(text, str)]
                scores, num_tokens = await encoder.scores(asked.query or "", documents)
                rows = scores[:, None]
        finally:
            self._end(offline=request.offline)
        yield Chunk(text="", tokens=(), finish_reason="stop", rows=rows, prompt_tokens=num_tokens)

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap."""
        running = min(self._num_running, self._num_at_once)
        busy_s = time.perf_counter() - self._busy_since_s if running else 0.0
        return EngineStats(
            running_requests=running,
            queued_requests=self._num_running - running,
            active_lanes=running,
            busy_seconds_total=self._busy_s + busy_s,
        )

    def check_health(self) -> None:
        """Raise `EngineFailed` if the engine cannot serve (any more)."""
        if self._encoder is None:
            raise EngineFailed(f"the engine {self._spec.name} is not running")

    async def stop(self) -> None:
        """Free everything; idempotent."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            await asyncio.to_thread(encoder.close)

    async def _in_pauses(
        self, encoder: Encoder, ids: Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        """Return the vectors of what nobody waits for."""
        found = []
        for start in range(0, len(ids), _OFFLINE_TEXTS):
            await self._nobody_waits.wait()
            found.append(await encoder.vectors(ids[start : start + _OFFLINE_TEXTS]))
        return np.concatenate(found)

    def _begin(self, *, offline: bool) -> None:
        if not self._num_running:
            self._busy_since_s = time.perf_counter()
        self._num_running += 1
        self._num_waited_for += not offline
        if self._num_waited_for:
            self._nobody_waits.clear()

    def _end(self, *, offline: bool) -> None:
        self._num_running -= 1
        self._num_waited_for -= not offline
        if not self._num_waited_for:
            self._nobody_waits.set()
        if not self._num_running:
            self._busy_s += time.perf_counter() - self._busy_since_s
