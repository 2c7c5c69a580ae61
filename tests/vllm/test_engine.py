"""The engine `vllm` with a shipped chunk, on whatever device the installed vLLM runs."""

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.engines.base import Chunk, GenerationRequest, SamplingOptions, Structure
from models.engines.registry import create_engine
from models.engines.vllm.engine import VllmEngine
from models.errors import ContextOverflow, EngineFailed, EngineOverloaded, PoolError, RequestError
from models.pool import DEFAULT_POOL, load_pool
from models.spec import EngineSpec, Model
from models.tokenizer import load_tokenizer

QUESTIONS = ("Write the word 'lantern' backwards.", "What is 37 + 58?", "How many m in 3 km?")
CONTEXT_TOKENS = 200
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def _spec(**changes: Any) -> EngineSpec:
    engine_args = {"enforce_eager": True, "max_model_len": CONTEXT_TOKENS, "max_num_seqs": 4}
    return EngineSpec.model_validate(
        {
            "name": "e",
            "kind": "vllm",
            "dtype": "float32",
            "kv_memory_bytes": 64 * 2**20,
            "max_queued_requests": 2,
            "options": {"engine_args": engine_args, "num_threads": 1},
            **changes,
        }
    )


@pytest.fixture(scope="module", name="model")
def shipped_model() -> Model:
    """The first chunk of the shipped pool."""
    return load_pool(DEFAULT_POOL).models[0]


@pytest.fixture(scope="module", name="reference")
def transformers_model(model: Model) -> Any:
    """The same checkpoint in transformers."""
    assert model.card is not None
    return AutoModelForCausalLM.from_pretrained(model.card.path, dtype=torch.float32)


@pytest.fixture(scope="module", name="answer")
def greedy_answer(model: Model, reference: Any) -> str:
    """What transformers answers to the first question, greedily."""
    prompt = torch.tensor([_request(model).prompt_tokens])
    with torch.inference_mode():
        whole = reference.generate(prompt, do_sample=False, max_new_tokens=64)
    return load_tokenizer(model).decode(whole[0, prompt.shape[1] :].tolist())


@pytest.fixture(scope="module", name="loop")
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The loop that the engine lives on."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module", name="run")
def runner(loop: asyncio.AbstractEventLoop) -> Run:
    """Return what runs a coroutine on the engine's loop."""
    return loop.run_until_complete


@pytest.fixture(scope="module", name="engine")
def started(model: Model, run: Run) -> Iterator[VllmEngine]:
    """One engine for this file."""
    engine = create_engine(_spec(), [model])
    assert isinstance(engine, VllmEngine)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # it would win over kv_memory_bytes
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling vLLM's sampler takes a minute
        run(engine.start())
    yield engine
    run(engine.stop())
    with pytest.raises(EngineFailed, match="not running"):
        engine.check_health()


def _request(model: Model, text: str = QUESTIONS[0], *, name: str = "r", **sampling: Any) -> Any:
    tokens = load_tokenizer(model).encode_chat([{"role": "user", "content": text}])
    sampling.setdefault("temperature", 0)
    return GenerationRequest(
        request_id=name,
        prompt_tokens=tokens,
        members=(model.name,),
        sampling=SamplingOptions(**sampling),
    )


async def _read(engine: VllmEngine, request: GenerationRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


def _text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def _tokens(chunks: list[Chunk]) -> list[int]:
    return [token.token_id for chunk in chunks for token in chunk.tokens]


def test_greedy_tokens_and_logprobs_are_transformers(
    engine: VllmEngine, model: Model, reference: Any, run: Run
) -> None:
    """Tokens equal those of transformers; log-probabilities differ by rounding only."""
    for question in QUESTIONS:
        request = _request(model, question, max_tokens=24, ignore_eos=True, top_logprobs=3)
        chunks = run(_read(engine, request))
        prompt = torch.tensor([request.prompt_tokens])
        with torch.inference_mode():
            whole = torch.cat([prompt, torch.tensor([_tokens(chunks)])], dim=1)
            logp = reference(whole).logits[0, prompt.shape[1] - 1 : -1].float().log_softmax(-1)
        assert _tokens(chunks) == logp.argmax(-1).tolist()
        tokens = [token for chunk in chunks for token in chunk.tokens]
        for token, row in zip(tokens, logp, strict=True):
            best = row.topk(3)
            assert [other.token_id for other in token.top] == best.indices.tolist()
            told = [other.logprob for other in token.top]
            assert told == pytest.approx(best.values.tolist(), abs=1e-3)
            assert token.logprob == pytest.approx(float(row.max()), abs=1e-3)


def test_an_answer_ends_by_itself(engine: VllmEngine, model: Model, answer: str, run: Run) -> None:
    """The end token is counted and leaves no text; the texts of the tokens are the answer."""
    chunks = run(_read(engine, _request(model, max_tokens=64)))
    assert _text(chunks) == answer
    assert [chunk.finish_reason for chunk in chunks][-2:] == [None, "stop"]
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert tokens[-1].raw == b""
    assert b"".join(token.raw for token in tokens).decode() == answer


def test_options_are_obeyed(engine: VllmEngine, model: Model, answer: str, run: Run) -> None:
    """Stop strings, length, bias, seeds and filters do what the API says."""
    last = answer[-1]
    stopped = run(_read(engine, _request(model, stop=(last,), max_tokens=64)))
    assert _text(stopped) == answer[: answer.index(last)]
    assert stopped[-1].finish_reason == "stop"
    short = run(_read(engine, _request(model, max_tokens=1)))
    assert (len(_tokens(short)), short[-1].finish_reason) == (1, "length")
    [banned, *_] = _tokens(short)
    biased = run(_read(engine, _request(model, max_tokens=2, logit_bias={banned: -100})))
    assert _tokens(biased)[0] != banned
    drawn = [
        _tokens(run(_read(engine, _request(model, temperature=2, seed=seed, max_tokens=16))))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    filtered = run(_read(engine, _request(model, temperature=2, top_k=1, max_tokens=16)))
    assert _text(filtered) == answer[: len(_text(filtered))] != ""


def test_penalties_are_obeyed(engine: VllmEngine, model: Model, run: Run) -> None:
    """A strong penalty keeps a token from coming again."""
    plain = _request(model, max_tokens=12, ignore_eos=True, frequency_penalty=2, temperature=0)
    biased = run(_read(engine, plain))
    assert (
        len(set(_tokens(biased)))
        > len(set(_tokens(run(_read(engine, _request(model, max_tokens=12, ignore_eos=True)))))) - 1
    )


def test_structured_output(engine: VllmEngine, model: Model, run: Run) -> None:
    """Whatever the model would like to say, the answer follows the schema."""
    # Without places for white space, of which so small a model finds no end.
    request = _request(
        model, structure=Structure(kind="json", text='{"enum": ["yes", "no"]}'), max_tokens=60
    )
    assert json.loads(_text(run(_read(engine, request)))) in ("yes", "no")
    with pytest.raises(RequestError):
        run(
            _read(
                engine,
                _request(model, structure=Structure(kind="json", text='{"type": "nonsense"}')),
            )
        )


def test_requests_side_by_side(engine: VllmEngine, model: Model, answer: str, run: Run) -> None:
    """More requests than run at once wait; beyond the queue they are refused; answers are equal."""

    async def many(num: int) -> list[Any]:
        requests = [_request(model, name=f"m{i}", max_tokens=64) for i in range(num)]
        reads = [_read(engine, request) for request in requests]
        return await asyncio.gather(*reads, return_exceptions=True)

    answers = run(many(8))
    texts = [_text(chunks) for chunks in answers if isinstance(chunks, list)]
    assert texts == [answer] * 6
    assert sum(isinstance(error, EngineOverloaded) for error in answers) == 2


def test_offline_work_runs_after_all_others(engine: VllmEngine, model: Model, run: Run) -> None:
    """While vLLM is full, what nobody waits for comes after a request that came later."""

    async def ask() -> list[str]:
        ended: list[str] = []

        async def read(name: str, max_tokens: int, *, offline: bool = False) -> None:
            request = _request(model, name=name, max_tokens=max_tokens, ignore_eos=True)
            await _read(engine, replace(request, offline=offline))
            ended.append(name)

        async with asyncio.TaskGroup() as tasks:
            for i in range(4):  # as many as run at once
                tasks.create_task(read(f"running-{i}", 120 + i))
            # In this order and at once: however fast the machine, the four are far from their end.
            tasks.create_task(read("batch", 2, offline=True))
            tasks.create_task(read("person", 2))
        return ended

    ended = run(ask())
    assert ended.index("person") < ended.index("batch")


def test_leaving_aborts(engine: VllmEngine, model: Model, run: Run) -> None:
    """A reader who leaves frees the lane and the cache within a step."""

    async def leave() -> None:
        long = _request(model, max_tokens=150, ignore_eos=True)
        stream = engine.generate(long)
        await anext(stream)
        assert engine.stats().running_requests == 1
        await stream.aclose()  # type: ignore[attr-defined]
        before = engine.stats().generated_tokens_total
        reading = asyncio.create_task(_read(engine, long))
        async with asyncio.timeout(60):
            while engine.stats().generated_tokens_total == before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert engine.stats().running_requests == 0
        # What vLLM itself says of its memory, at the next step of another request.
        await _read(engine, _request(model, name="next", max_tokens=2))
        assert engine._running is not None
        assert not engine._running.llm.output_processor.has_unfinished_requests()

    run(leave())


def test_refuses_what_it_cannot_run(engine: VllmEngine, model: Model, run: Run) -> None:
    """Each refusal is the request's fault, and names it."""
    good = _request(model)

    def ask(**changes: Any) -> list[Chunk]:
        return run(_read(engine, GenerationRequest(**{**vars(good), **changes})))  # type: ignore[no-any-return]

    with pytest.raises(RequestError, match="'eve' is unknown"):
        ask(members=("eve",))
    with pytest.raises(ContextOverflow, match=r"maximum context length of .* is 200 "):
        ask(prompt_tokens=(1,) * CONTEXT_TOKENS)
    with pytest.raises(RequestError, match="empty"):
        ask(prompt_tokens=())
    for prompt in ((10**6,), (-1,)):
        with pytest.raises(RequestError):
            ask(prompt_tokens=prompt)
    with pytest.raises(RequestError, match="temperature"):
        ask(sampling=SamplingOptions(temperature=-1))


def test_metrics_are_vllms_own(engine: VllmEngine, model: Model, run: Run) -> None:
    """The text has vLLM's counters, and what this engine generated is in them."""
    before = engine.stats().generated_tokens_total
    run(_read(engine, _request(model, max_tokens=5, ignore_eos=True)))
    assert engine.stats().generated_tokens_total == before + 5
    text = engine.metrics()
    [line] = [row for row in text.splitlines() if row.startswith("vllm:generation_tokens_total{")]
    assert float(line.split()[-1]) == before + 5
    assert math.isclose(engine.stats().kv_bytes_total, 64 * 2**20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:7"}, "device: cuda:7 is not there"),
        ({"options": {"engine_args": {"max_modellen": 3}}}, "no such argument; max_model_len"),
        ({"options": {"engine_args": {"max_num_batched_tokens": -1}}}, "vLLM refuses them"),
    ],
)
def test_bad_arguments_name_the_key(
    model: Model, run: Run, changes: dict[str, Any], message: str
) -> None:
    """Names are refused before vLLM is loaded, values by vLLM itself."""
    if torch.cuda.is_available() and "device" in changes:
        pytest.skip("there is a CUDA device")
    with pytest.raises(PoolError, match=message):
        run(create_engine(_spec(**changes), [model]).start())
