"""llama.cpp's server in this process, without a door: nobody but its owner can ask it.

The binding always opens an HTTP listener, by default on a loopback port without a key. Here it is a
socket file in a folder that only this user can enter, with a random key; and the file is removed as
soon as the server runs, after which nothing can connect. Requests are calls into the library.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

from models.card import ModelCard
from models.engines.llamacpp import LlamacppOptions, Pooling, slots
from models.errors import EngineFailed, PoolError, RequestError
from models.spec import EngineSpec

Event: TypeAlias = Mapping[str, Any]
"""One message of an answer, as llama.cpp's server streams them."""

# Makes GNU OpenMP's threads sleep where they wait; read once, when the library is loaded.
_WAITING = "OMP_WAIT_POLICY"
_ERRORS_ONLY = 1


class Server:
    """One loaded model. `ask` may be called from several threads at once, one per slot."""

    def __init__(
        self,
        spec: EngineSpec,
        options: LlamacppOptions,
        card: ModelCard,
        pooling: Pooling | None = None,
    ) -> None:
        """Load the model, to encode where it pools, and run it once.

        Raises `PoolError` for what llama.cpp cannot run.
        """
        with _waiting(polling=options.polling):
            import xllamacpp  # noqa: PLC0415 - an extra

        num_slots, context_tokens = slots(spec, options, card)
        params = xllamacpp.CommonParams()
        params.model.path = str(card.path)
        _choose_device(xllamacpp, params, spec.device)
        params.n_parallel = num_slots
        params.n_ctx = num_slots * context_tokens
        # Slots apart: what stands in one changes no other's rounding.
        params.kv_unified = False
        # An encoder reads a text at once: each of its tokens sees all others.
        params.n_batch = params.n_ubatch = context_tokens if pooling else options.step_tokens
        params.cache_ram_mib = 0 if pooling else options.prompt_cache_mib
        params.fit_params = False  # what is asked for, or an error
        params.ctx_shift = False
        for threads in (params.cpuparams, params.cpuparams_batch):
            threads.n_threads = options.num_threads or len(os.sched_getaffinity(0))
            threads.poll = 100 if options.polling else 0
        params.ui = params.endpoint_slots = False
        params.n_threads_http = 1
        params.verbosity = _ERRORS_ONLY
        if pooling is not None:
            params.embedding = True
            kinds = xllamacpp.llama_pooling_type
            params.pooling_type = getattr(kinds, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
        params.api_keys = [secrets.token_urlsafe(32)]
        params.cors_origins = ""
        with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
            params.hostnames = [f"{folder}/closed.sock"]
            try:
                self._server = xllamacpp.Server(params)
            except RuntimeError as error:
                raise PoolError(f"{card.path}: llama.cpp cannot run it: {error}") from None

    def close(self) -> None:
        """End llama.cpp's threads and free its memory, once no call is running."""
        self._server = None

    def ask(self, body: Mapping[str, Any], on_event: Callable[[Event], bool]) -> None:
        """Answer the request `body`, on the calling thread, until it is done.

        Each message goes to `on_event`, which returns whether to stop. Raises `RequestError` or
        `EngineFailed`.
        """
        with _failures():
            self._server.handle_completions(dict(body), on_event)

    def embed(self, rows: Sequence[Sequence[int]]) -> tuple[list[list[float]], int]:
        """Return the vectors of `rows` of token ids, and how many tokens were read."""
        with _failures():
            told = self._server.handle_embeddings({"input": [list(row) for row in rows]})
        vectors = [one["embedding"] for one in sorted(told["data"], key=lambda one: one["index"])]
        return vectors, told["usage"]["prompt_tokens"]

    def rank(self, query: str, documents: Sequence[str]) -> tuple[list[float], int]:
        """Return the model's score of each document, and how many tokens were read."""
        body = {"query": query, "documents": list(documents)}
        with _failures():
            told = self._server.handle_rerank(body)
        scores = {one["index"]: one["relevance_score"] for one in told["results"]}
        return [scores[index] for index in range(len(documents))], told["usage"]["prompt_tokens"]


class Call:
    """One request to a server, on a thread of its own; its messages come to the event loop.

    `done` is set once the thread has left llama.cpp, which then has the request's slot free.
    """

    def __init__(self, server: Server, threads: Executor, body: Mapping[str, Any]) -> None:
        """Start it; see `Server.ask`."""
        self._loop = asyncio.get_running_loop()
        self._received: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._cancelled = False
        self.done = self._loop.run_in_executor(threads, partial(server.ask, body, self._receive))
        self.done.add_done_callback(lambda done: self._received.put_nowait(done.exception()))

    async def events(self) -> AsyncIterator[Event]:
        """Yield the messages until the last; raises what `Server.ask` raises."""
        while (received := await self._received.get()) is not None:
            if isinstance(received, BaseException):
                raise received
            yield received

    def cancel(self) -> None:
        """Stop at the next message; llama.cpp sends one per token and per step of a prompt."""
        self._cancelled = True

    def fail(self, error: EngineFailed) -> None:
        """Cancel it, and have its reader raise `error`."""
        self.cancel()
        self._received.put_nowait(error)

    def _receive(self, event: Event) -> bool:
        """Runs on the call's thread; returns whether to stop."""
        if not self._cancelled:
            self._loop.call_soon_threadsafe(self._received.put_nowait, event)
        return self._cancelled


def _choose_device(xllamacpp: Any, params: Any, device: str) -> None:  # noqa: ANN401 - untyped
    kind, _, index = device.partition(":")
    if kind == "cpu":
        params.n_gpu_layers = 0
        return
    if kind == "cuda":
        if not any("GPU" in str(found["type"]) for found in xllamacpp.get_device_info()):
            raise PoolError(f"device: {device} is not there for this xllamacpp; try auto or cpu")
        if index:
            params.main_gpu = int(index)
            params.split_mode = xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE


@contextmanager
def _failures() -> Iterator[None]:
    """Raise what the library raises as what it means: `RequestError` or `EngineFailed`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise RequestError(str(error)) from None
    except RuntimeError as error:
        raise EngineFailed(f"llama.cpp failed: {error}") from error


@contextmanager
def _waiting(*, polling: bool) -> Iterator[None]:
    """Set how threads wait, around the library's import and for no other library."""
    if polling or _WAITING in os.environ:
        yield
        return
    os.environ[_WAITING] = "passive"
    try:
        yield
    finally:
        del os.environ[_WAITING]
