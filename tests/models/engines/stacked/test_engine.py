"""The engine as others see it: batching, limits, cancellation, failure, grammar."""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from models.engines.base import Chunk, Engine, GenerationRequest, Structure
from models.engines.stacked.runner import Runner
from models.errors import (
    ContextOverflow,
    EngineFailed,
    EngineOverloaded,
    RequestError,
)
from tests.models.engines.stacked.tiny import (
    CONTEXT_TOKENS,
    VOCAB_SIZE,
    answer,
    build_engine,
    build_tokenizer,
    read,
    request,
    running,
    save_checkpoint,
    text_of,
    token_ids,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four random checkpoints (seeds 0 to 3)."""
    root = tmp_path_factory.mktemp("engine")
    return [save_checkpoint(root / f"{s}", seed=s, initializer_range=0.08) for s in range(4)]


requests = st.builds(
    request,
    st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=60),
    st.lists(st.sampled_from(["m0", "m1", "m2", "m3"]), min_size=1, max_size=4, unique=True),
    rule=st.sampled_from(["mixture", "product"]),
    client_id=st.sampled_from(["a", "b"]),
    temperature=st.sampled_from([0.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 16),
)


# Shrinking would run into the test's time limit.
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    plan=st.lists(
        st.tuples(requests, st.integers(0, 6), st.one_of(st.none(), st.integers(0, 8))),
        min_size=2,
        max_size=6,
    ),
    step_rows=st.sampled_from([8, 64, 2048]),
)
def test_answers_do_not_depend_on_the_batch(
    folders: list[Path],
    plan: list[tuple[GenerationRequest, int, int | None]],
    step_rows: int,
) -> None:
    """Random arrivals, lengths, member sets, seeds and cancellations: each request's tokens are
    those of its run alone, a cancelled one's a prefix, and the cache is empty in the end."""

    async def one(
        engine: Engine, wanted: GenerationRequest, delay: int, cancel_after: int | None
    ) -> list[Chunk]:
        for _ in range(delay):
            await asyncio.sleep(0.001)
        chunks: list[Chunk] = []
        async with aclosing(engine.generate(wanted)) as stream:  # type: ignore[type-var]
            async for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == cancel_after:
                    break
        return chunks

    async def run() -> tuple[list[list[Chunk]], list[list[Chunk]]]:
        # A small cache, so that some have to wait.
        engine = build_engine(folders, step_rows=step_rows, kv_memory_bytes=400 * 512)
        async with running(engine):
            mixed = await asyncio.gather(*(one(engine, *entry) for entry in plan))
            await until(lambda: engine.stats().running_requests == 0)
            stats = engine.stats()
            assert (stats.kv_bytes_used, stats.active_lanes, stats.queued_requests) == (0, 0, 0)
            alone = [await read(engine, wanted) for wanted, _, _ in plan]
        return mixed, alone

    mixed, alone = asyncio.run(run())
    for got, expected, (_, _, cancel_after) in zip(mixed, alone, plan, strict=True):
        if cancel_after is None or cancel_after == 0:
            assert token_ids(got) == token_ids(expected)
            assert text_of(got) == text_of(expected)
        else:
            received = token_ids(got)  # a chunk may hold several tokens
            assert len(received) >= min(cancel_after, len(token_ids(expected)))
            assert received == token_ids(expected)[: len(received)]


@pytest.mark.parametrize(
    ("interval_ms", "sizes"), [(0.0, [1] * 12), (3_600_000.0, [1, 11])], ids=["0", "an hour"]
)
def test_tokens_between_the_first_and_the_last_are_gathered(
    folders: list[Path], interval_ms: float, sizes: list[int]
) -> None:
    """The first token comes at once, the rest every stream interval, or when the answer ends."""

    async def run() -> list[Chunk]:
        async with running(build_engine(folders, stream_interval_ms=interval_ms)) as engine:
            return await read(engine, request([7, 8, 9], max_tokens=12, ignore_eos=True))

    assert [len(chunk.tokens) for chunk in asyncio.run(run())] == sizes


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition on the engine's thread."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the engine's thread tells nobody
            await asyncio.sleep(0.001)


class Steps:
    """The engine's steps, which begin when a test lets them, however slow its own thread is."""

    def __init__(self, step: Callable[[Runner, Any], Any]) -> None:
        self._step = step
        self._left = threading.Semaphore(0)
        self._held = False

    def step(self, runner: Runner, parts: Any) -> Any:
        """Run a step as soon as it may begin."""
        assert not self._held or self._left.acquire(timeout=60)
        return self._step(runner, parts)

    def hold(self, *, after: int) -> None:
        """Let `after` steps more begin, and no other."""
        self._held = True
        for _ in range(after):
            self._left.release()

    def go_on(self) -> None:
        """Hold none any more."""
        self._held = False
        self._left.release()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The steps of the engine that a test starts."""
    found = Steps(Runner.step)

    def step(runner: Runner, parts: Any) -> Any:
        return found.step(runner, parts)

    monkeypatch.setattr(Runner, "step", step)
    return found


async def test_only_active_lanes_are_held(folders: list[Path], steps: Steps) -> None:
    """A request holds one lane per member of weight above zero, and its rows of the cache."""
    engine = build_engine(folders)
    async with running(engine):
        wanted = request(
            [5] * 10, ("m3", "m0", "m1"), weights=(1, 0, 2), max_tokens=200, ignore_eos=True
        )
        steps.hold(after=1)
        async with aclosing(engine.generate(wanted)) as stream:  # type: ignore[type-var]
            await anext(stream)
            stats = engine.stats()
            assert (stats.running_requests, stats.active_lanes) == (1, 2)
            # 2 layers, keys and values of 2 heads of 16 floats
            assert stats.kv_bytes_used == 2 * 209 * (2 * 2 * 2 * 16 * 4)
        steps.go_on()
        await until(lambda: engine.stats().kv_bytes_used == 0)


async def test_cancelling_the_reading_task_frees_its_lanes(
    folders: list[Path], steps: Steps
) -> None:
    """A cancelled reader's request is gone, and one that waited for its room runs."""
    engine = build_engine(folders, kv_memory_bytes=256 * 512)
    async with running(engine):
        steps.hold(after=0)
        reader = asyncio.create_task(
            read(engine, request([5] * 56, max_tokens=200, ignore_eos=True))
        )
        waiting = asyncio.create_task(read(engine, request([6] * 100, max_tokens=8)))
        await asyncio.sleep(0)  # both are submitted
        steps.hold(after=1)
        await until(lambda: engine.stats().queued_requests == 1)
        assert engine.stats().running_requests == 1
        reader.cancel()
        await asyncio.sleep(0)
        steps.go_on()
        assert (await waiting)[-1].finish_reason is not None
        with pytest.raises(asyncio.CancelledError):
            await reader


async def test_the_queue_is_bounded(folders: list[Path], steps: Steps) -> None:
    """One request too many is turned away at once, saying when to come back; the rest finish."""
    engine = build_engine(folders, kv_memory_bytes=256 * 512, max_queued_requests=2)
    async with running(engine):
        wanted = [request([5] * 100, max_tokens=100, ignore_eos=True) for _ in range(4)]
        steps.hold(after=0)
        reading = [asyncio.create_task(read(engine, one)) for one in wanted]
        await asyncio.sleep(0)  # all are submitted
        steps.go_on()
        results = await asyncio.gather(*reading, return_exceptions=True)
    assert [type(result) for result in results] == [list, list, list, EngineOverloaded]
    assert results[3].retry_after_s >= 1  # type: ignore[union-attr]


async def test_clients_take_turns(folders: list[Path], steps: Steps) -> None:
    """A client with one request does not wait behind another's twenty."""
    engine = build_engine(folders, kv_memory_bytes=64 * 512)
    finished: list[str] = []

    async def one(client: str) -> None:
        await read(engine, request([5] * 20, max_tokens=40, client_id=client, ignore_eos=True))
        finished.append(client)

    async with running(engine):
        steps.hold(after=0)
        greedy = [asyncio.create_task(one("greedy")) for _ in range(20)]
        await asyncio.sleep(0)  # all are submitted
        steps.hold(after=1)
        await until(lambda: engine.stats().queued_requests >= 15)
        modest = asyncio.create_task(one("modest"))
        await asyncio.sleep(0)
        steps.go_on()
        await asyncio.gather(modest, *greedy)
    # Those that were running or admitted next when it came, not the whole queue.
    assert finished.index("modest") <= 7


def test_long_prompts_do_not_stop_others(folders: list[Path], steps: Steps) -> None:
    """While a long prompt is read in chunks, a running answer goes on with every step."""

    async def run() -> list[str]:
        engine = build_engine(folders, step_rows=8)
        order: list[str] = []

        async def one(name: str, wanted: GenerationRequest) -> None:
            async for _ in engine.generate(wanted):
                order.append(name)  # noqa: PERF401 - the order of both is the point

        async with running(engine):
            steps.hold(after=1)
            short = asyncio.create_task(one("short", request([5], max_tokens=120, ignore_eos=True)))
            await until(lambda: len(order) > 0)
            long = asyncio.create_task(one("long", request([6] * 200, max_tokens=1)))
            await asyncio.sleep(0)  # it is submitted
            steps.go_on()
            await asyncio.gather(short, long)
        return order

    order = asyncio.run(run())
    # 200 tokens in chunks of at most 7: 29 steps, in each of which the short one moves on.
    assert order.index("long") >= 25


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        (request([1] * CONTEXT_TOKENS), ContextOverflow, "maximum context length of m0 is 256"),
        (request([]), RequestError, "empty"),
        (request([VOCAB_SIZE]), RequestError, "outside of the vocabulary"),
        (request([1], logit_bias={VOCAB_SIZE: 1.0}), RequestError, "logit_bias"),
        (request([1], ["nobody"]), RequestError, "'nobody' is unknown"),
        (request([1], ["m0", "m1"], weights=(0, 0)), RequestError, "not all may be zero"),
        (request([1], max_tokens=0), RequestError, "max_tokens: 0 is not in"),
        (request([1], stop=("",)), RequestError, "stop: an empty string"),
        (request([1] * 150, ["m0", "m1"], max_tokens=90), RequestError, "lower max_tokens"),
        (
            request([1], structure=Structure(kind="json", text='{"type": "wish"}')),
            RequestError,
            "response_format",
        ),
    ],
)
def test_refuses(
    folders: list[Path], wanted: GenerationRequest, error: type[RequestError], message: str
) -> None:
    """What cannot run is refused on the first read, with the reason."""
    with pytest.raises(error, match=message):
        answer(build_engine(folders, kv_memory_bytes=400 * 512), wanted)


def test_the_context_ends_an_answer(folders: list[Path]) -> None:
    """An answer that would outgrow the context ends there, for length."""
    [chunks] = answer(build_engine(folders), request([5] * 250, max_tokens=100, ignore_eos=True))
    assert len(token_ids(chunks)) == CONTEXT_TOKENS - 250
    assert chunks[-1].finish_reason == "length"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_end_token_and_stop_string(folders: list[Path]) -> None:
    """The end token counts and leaves no text; a stop string ends the text before it."""
    end = request([5, 6], logit_bias={0: 100.0})
    free = request([5, 6], max_tokens=30, logit_bias={0: -100.0})
    engine = build_engine(folders)
    [ended, whole] = answer(engine, end, free)
    assert (token_ids(ended), text_of(ended), ended[-1].finish_reason) == ([0], "", "stop")
    text = text_of(whole)
    stop = text[5:9]
    [stopped] = answer(engine, request([5, 6], max_tokens=30, logit_bias={0: -100.0}, stop=(stop,)))
    assert text_of(stopped) == text[: text.index(stop)]
    assert stopped[-1].finish_reason == "stop"


def test_json_schema(folders: list[Path]) -> None:
    """Random models, fused and alone, hot: what comes out parses and validates."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 999},
            "kind": {"enum": ["fish", "school"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    answers = answer(
        build_engine(folders),
        *(
            request(
                [5, 6, 7],
                ["m0", "m1"][: 1 + seed % 2],
                structure=Structure(kind="json", text=json.dumps(schema)),
                temperature=1.0,
                seed=seed,
                max_tokens=120,
            )
            for seed in range(6)
        ),
    )
    for chunks in answers:
        assert chunks[-1].finish_reason == "stop"
        jsonschema.validate(json.loads(text_of(chunks)), schema)
    assert len({text_of(chunks) for chunks in answers}) > 1


def test_a_failing_step_fails_its_requests_only(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that raises fails who was in it; the next request is answered. Where a step of the
    engine's own fails like those of three requests in a row, it says that it cannot serve."""
    step, broken = Runner.step, True

    def failing(self: Runner, parts: Any) -> Any:
        if broken:
            raise ArithmeticError("a broken kernel")
        return step(self, parts)

    async def run() -> None:
        nonlocal broken
        engine = build_engine(folders)
        broken = False
        async with running(engine):
            monkeypatch.setattr(Runner, "step", failing)
            broken = True
            with pytest.raises(EngineFailed, match="a broken kernel"):
                await read(engine, request([5]))
            broken = False
            assert token_ids(await read(engine, request([5])))
            assert engine.stats().kv_bytes_used == 0
            broken = True
            for _ in range(3):
                with pytest.raises(EngineFailed):
                    await read(engine, request([5]))
            await until(lambda: _fails(engine))
            with pytest.raises(EngineFailed, match="every step fails, whatever is in it"):
                await read(engine, request([5]))

    asyncio.run(run())


def _fails(engine: Engine) -> bool:
    try:
        engine.check_health()
    except EngineFailed:
        return True
    return False


async def test_stopping_fails_what_runs(folders: list[Path], steps: Steps) -> None:
    """`stop` ends running answers with an error, can be repeated, and the engine says so."""
    engine = build_engine(folders)
    await engine.start()
    steps.hold(after=0)
    reader = asyncio.create_task(read(engine, request([5], max_tokens=250, ignore_eos=True)))
    await until(lambda: engine.stats().running_requests == 1)
    stopping = asyncio.create_task(engine.stop())
    await asyncio.sleep(0)  # it is told to
    steps.go_on()
    await stopping
    await engine.stop()
    with pytest.raises(EngineFailed, match="stopped"):
        await reader
    with pytest.raises(EngineFailed, match="not running"):
        engine.check_health()


def test_text_of_tokens(folders: list[Path]) -> None:
    """The tokens' bytes joined are the text, as the tokenizer decodes it."""
    [chunks] = answer(
        build_engine(folders), request([5, 6, 7], max_tokens=40, temperature=1.0, seed=4)
    )
    tokens = [token for chunk in chunks for token in chunk.tokens]
    raw = b"".join(token.raw for token in tokens)
    assert text_of(chunks) == raw.decode(errors="replace")
    ids = [token.token_id for token in tokens]
    assert text_of(chunks) == build_tokenizer().decode(ids, skip_special_tokens=True)
