"""How the llamacpp engine runs: slots, queue, failures, and what it refuses."""

import asyncio
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import psutil
import pytest

from models.answer_format import Tools
from models.card import read_card
from models.engines.base import Engine, SamplingOptions
from models.engines.llamacpp.binding import Event, Server
from models.engines.registry import engine_traits
from models.errors import ContextOverflow, EngineFailed, EngineOverloaded, PoolError, RequestError
from models.pool import DEFAULT_POOL
from tests.models.engines.llamacpp.smollm2 import (
    CAPITAL,
    MODEL,
    Read,
    ask,
    engine_spec,
    read_all,
    running,
    text_of,
)


async def test_prompts_are_kept(read: Read) -> None:
    """A prompt that was read before is not read again, and the answer says so."""
    question = ask("Which of the seas around Europe is the saltiest one?", max_tokens=2)
    await read(question)
    num_cached = (await read(question))[-1].cached_tokens
    assert num_cached is not None
    assert 0 < num_cached < len(question.prompt_tokens)


async def test_closing_frees_the_slot_during_the_prompt(engine: Engine) -> None:
    """A request that is cancelled while its long prompt is read frees its slot and its rows."""
    reading = asyncio.create_task(read_all(engine, ask("word " * 1000)))
    while not engine.stats().running_requests:  # noqa: ASYNC110 - the thread has no event
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    async with asyncio.timeout(60):
        while engine.stats().running_requests:  # noqa: ASYNC110 - the thread has no event
            await asyncio.sleep(0.01)
    assert engine.stats().kv_bytes_used == 0


async def test_the_queue_is_bounded() -> None:
    """One runs, one waits, the third is told to come back; the second runs when the first goes."""
    async with running(options={"num_slots": 1}, max_queued_requests=1) as engine:
        first = engine.generate(ask("Tell me a story.", max_tokens=200, ignore_eos=True))
        await anext(first)
        second = asyncio.create_task(read_all(engine, ask(CAPITAL)))
        await asyncio.sleep(0.05)
        stats = engine.stats()
        assert (stats.running_requests, stats.queued_requests) == (1, 1)
        with pytest.raises(EngineOverloaded):
            await read_all(engine, ask(CAPITAL))
        await first.aclose()  # type: ignore[attr-defined]
        assert "Paris" in text_of(await second)


async def test_offline_work_runs_after_all_others() -> None:
    """Of those that wait for a slot, the one that nobody waits for goes last, if it came first."""
    async with running(options={"num_slots": 1}) as engine:
        first = engine.generate(ask("Tell me a story.", max_tokens=200, ignore_eos=True))
        await anext(first)
        ended: list[str] = []

        async def read(name: str, *, offline: bool) -> None:
            await read_all(engine, replace(ask(CAPITAL, max_tokens=2), offline=offline))
            ended.append(name)

        waiting = [asyncio.create_task(read("batch", offline=True))]
        await asyncio.sleep(0.05)
        waiting += [asyncio.create_task(read(name, offline=False)) for name in "ab"]
        await asyncio.sleep(0.05)
        await first.aclose()  # type: ignore[attr-defined]
        await asyncio.gather(*waiting)
        assert ended == ["a", "b", "batch"]


@pytest.mark.parametrize("broken", [False, True])
async def test_requests_that_fail_are_told_from_an_engine_that_does(
    monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """However many of one client's answers fail, the others get theirs; unless every answer fails,
    also one that nobody asked for.
    """
    answer = Server.ask

    def failing(self: Server, body: Mapping[str, Any], on_event: Callable[[Event], bool]) -> None:
        if broken or body.get("seed") == 13:
            raise EngineFailed("llama.cpp failed: a slot")
        answer(self, body, on_event)

    monkeypatch.setattr(Server, "ask", failing)
    async with running(options={"num_slots": 1}) as engine:
        for _ in range(7):
            with pytest.raises(EngineFailed):
                await read_all(engine, ask(CAPITAL, max_tokens=2, seed=13))
            await asyncio.sleep(0.05)  # for the engine's own
        if broken:
            with pytest.raises(EngineFailed, match="every answer fails, whatever is asked"):
                engine.check_health()
        else:
            assert await read_all(engine, ask(CAPITAL, max_tokens=2))


async def test_stopping_fails_what_runs_and_waits() -> None:
    """Both the running and the waiting request are told that the engine was stopped."""
    async with running(options={"num_slots": 1}) as engine:
        requests = [ask("A story!", max_tokens=400, ignore_eos=True) for _ in range(2)]
        reading = [asyncio.create_task(read_all(engine, request)) for request in requests]
        while not engine.stats().generated_tokens_total:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        await engine.stop()
        for ended in await asyncio.gather(*reading, return_exceptions=True):
            assert isinstance(ended, EngineFailed)
            assert "was stopped" in str(ended)


def test_nobody_else_can_ask(engine: Engine) -> None:
    """The engine listens on no port, and where its socket was nothing can connect."""
    sockets = psutil.Process().net_connections("all")
    assert not [s for s in sockets if s.status == psutil.CONN_LISTEN]
    files = [s.laddr for s in sockets if s.family == socket.AF_UNIX and "closed.sock" in s.laddr]
    assert files, "the binding opens one"
    for file in files:
        with socket.socket(socket.AF_UNIX) as client, pytest.raises(FileNotFoundError):
            client.connect(file)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"members": ("eve",)}, RequestError, "eve"),
        ({"prompt_tokens": ()}, RequestError, "prompt is empty"),
        ({"prompt_tokens": (49152,)}, RequestError, "outside of the vocabulary of 49152"),
        ({"prompt_tokens": (5,) * 8192}, ContextOverflow, "answer included"),
        ({"tools": Tools(functions=())}, RequestError, "general cannot call any"),
        ({"sampling": SamplingOptions(stop=("",))}, RequestError, "stop"),
        ({"sampling": SamplingOptions(max_tokens=0)}, RequestError, "max_tokens: 0"),
    ],
)
async def test_refuses_what_it_cannot_run(
    read: Read, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """What is at fault is named, before anything runs."""
    with pytest.raises(error, match=message):
        await read(replace(ask(CAPITAL), **change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {"slots": 3}}, "options: slots: unknown key"),
        ({"dtype": "float16"}, "dtype: 'float16' is not allowed"),
    ],
)
def test_bad_options_name_the_key(fields: dict[str, Any], message: str) -> None:
    """A wrong option is refused when the pool is read."""
    with pytest.raises(PoolError, match=message):
        engine_traits(engine_spec(**fields), [MODEL])


def test_one_file_per_engine() -> None:
    """Two models are refused, and so is a model that is no GGUF file."""
    with pytest.raises(PoolError, match="runs one model, not 2"):
        engine_traits(engine_spec(), [MODEL, MODEL])
    folder = read_card(DEFAULT_POOL / "code")
    with pytest.raises(PoolError, match="does not read safetensors"):
        engine_traits(engine_spec(), [replace(MODEL, card=folder)])


def test_the_cache_bounds_the_context() -> None:
    """Slots share the memory: the context is the model's where it fits, and never more than does.

    One token takes 30 layers x 2 x 3 heads x 64 numbers of two bytes.
    """
    row_bytes = 30 * 2 * 3 * 64 * 2

    def context(num_rows: int, **options: int) -> int | None:
        spec = engine_spec(kv_memory_bytes=num_rows * row_bytes, options=options)
        return engine_traits(spec, [MODEL]).context_tokens

    assert context(8 * 8192) == 8192
    assert context(8 * 8192, context_tokens=3000) == 3000
    assert context(8 * 4000) == 4000
    assert context(8 * 1000) == 2048
    assert context(1000) == 1000
