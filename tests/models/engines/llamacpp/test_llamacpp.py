"""What the llamacpp engine answers, on SmolLM2-135M-Instruct."""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.answer_format import Tools, join_calls
from models.card import read_card
from models.chat_template import Rendering
from models.engines.base import Engine, GenerationRequest, SamplingOptions
from models.engines.registry import engine_traits
from models.errors import RequestError
from models.tokenizer import load_tokenizer
from tests.models.engines.llamacpp.smollm2 import (
    CAPITAL,
    FILE,
    MODEL,
    TOKENIZER,
    Read,
    as_json,
    ask,
    engine_spec,
    read_all,
    running,
    text_of,
    tokens_of,
)

# So short that it fits in the place of SmolLM2's own.
_TEMPLATE_WITH_TOOLS = (
    "{% for x in tools %}{{ x|tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for t in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ t.function.name }}", "arguments": {{ t.function.arguments|tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITIES = ("Rome", "Berlin", "Madrid")


async def test_without_likelihoods_the_answer_is_the_same(read: Read) -> None:
    """Where nobody reads log-probabilities, text, count and end are what they are with them."""
    question = "Write: é 你好 🙂, thank you!"
    told, untold = [await read(ask(question, max_tokens=24, logprobs=it)) for it in (True, False)]
    assert text_of(told) == text_of(untold)
    assert told[-1].finish_reason == untold[-1].finish_reason
    assert len(tokens_of(told)) == len(tokens_of(untold))
    assert all(token.logprob is None for token in tokens_of(untold))
    assert b"".join(token.raw for token in tokens_of(untold)).decode() == text_of(untold)


async def test_answers_people(read: Read) -> None:
    """A question is answered in sentences, in many chunks, and the end token is counted."""
    chunks = await read(ask(CAPITAL))
    assert "Paris" in text_of(chunks)
    assert chunks[-1].finish_reason == "stop"
    assert len(chunks) > 4
    last = tokens_of(chunks)[-1]
    assert (last.token_id in MODEL.card.end_tokens, last.raw) == (True, b"")


async def test_tokens_spell_the_text(read: Read) -> None:
    """The tokens' bytes make up the text, and each is the likeliest of its alternatives."""
    chunks = await read(ask(CAPITAL, top_logprobs=3))
    tokens = tokens_of(chunks)
    assert b"".join(token.raw for token in tokens).decode() == text_of(chunks)
    for token in tokens:
        assert token.top[0].token_id == token.token_id
        assert token.top[0].logprob == token.logprob
        logprobs = [other.logprob for other in token.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert sum(math.exp(logprob) for logprob in logprobs) <= 1.0001
    assert not any(token.top for token in tokens_of(await read(ask(CAPITAL))))


async def test_characters_of_several_tokens_are_whole(read: Read) -> None:
    """An emoji, which several tokens spell, comes whole; all its tokens are counted."""
    chunks = await read(ask("Laugh!", structure=as_json('{"const": "😀😃😄"}')))
    assert text_of(chunks) == '"😀😃😄"'
    num_tokens = len(TOKENIZER.encode('"😀😃😄"'))
    assert num_tokens > 4
    assert len(tokens_of(chunks)) >= num_tokens


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda narrow: next(iter(narrow))
)
async def test_filters_narrow_to_the_likeliest(read: Read, narrow: dict[str, float]) -> None:
    """At a high temperature each filter alone can leave only the greedy answer."""
    assert text_of(await read(ask(CAPITAL, temperature=1.9, **narrow))) == text_of(
        await read(ask(CAPITAL))
    )


async def test_bias_and_penalties_change_tokens(read: Read) -> None:
    """A bias forbids a token; a penalty ends a repetition; probabilities stay the model's own."""
    first = tokens_of(await read(ask(CAPITAL, max_tokens=1)))[0]
    forbidden = {first.token_id: -100.0}
    [other] = tokens_of(
        await read(ask(CAPITAL, max_tokens=1, logit_bias=forbidden, top_logprobs=1))
    )
    assert other.token_id != first.token_id
    assert other.top[0].token_id == first.token_id
    assert other.top[0].logprob == pytest.approx(first.logprob, abs=1e-3)
    again = "Say dog dog dog dog dog dog dog dog again and again."
    plain, penalised = [
        text_of(await read(ask(again, max_tokens=24, ignore_eos=True, frequency_penalty=penalty)))
        for penalty in (0.0, 2.0)
    ]
    assert plain.count("dog") > penalised.count("dog")


async def test_ignores_the_end_where_asked(read: Read) -> None:
    """With ignore_eos an answer goes on to max_tokens."""
    chunks = await read(ask(CAPITAL, max_tokens=24, ignore_eos=True))
    assert (len(tokens_of(chunks)), chunks[-1].finish_reason) == (24, "length")


async def test_seeds_repeat(engine: Engine) -> None:
    """A seed gives the same answer, alone or beside others; another seed another."""
    warm = {"temperature": 1.0, "max_tokens": 12}
    alone = text_of(await read_all(engine, ask("Tell me a story.", seed=7, **warm)))
    beside = await asyncio.gather(
        *(read_all(engine, ask("Tell me a story.", seed=seed, **warm)) for seed in (7, 8, 7))
    )
    assert [text_of(chunks) == alone for chunks in beside] == [True, False, True]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [((" of",), "The capital"), (("x", " France"), "The capital of"), ((" of Spain",), None)],
)
async def test_stop_strings(read: Read, stop: tuple[str, ...], expected: str | None) -> None:
    """A stop string ends the answer before it; a mere beginning of one, even last, is text."""
    chunks = await read(ask(CAPITAL, stop=stop, max_tokens=3))
    assert text_of(chunks) == (expected or "The capital of")
    assert chunks[-1].finish_reason == ("length" if expected is None or stop[0] == "x" else "stop")


async def test_schemas_bind(read: Read) -> None:
    """An answer follows its schema, and the object is closed when it ends."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    chunks = await read(
        ask("Describe Paris as JSON.", structure=as_json(json.dumps(schema)), max_tokens=64)
    )
    answer = json.loads(text_of(chunks))
    assert set(answer) == {"city", "people"}
    assert isinstance(answer["people"], int)


@pytest.mark.parametrize("schema", ['{"type": "nonsense"}', '{"$ref": "#/nope"}'])
async def test_schemas_that_cannot_be_used_are_refused(read: Read, schema: str) -> None:
    """llama.cpp itself would answer freely; the request is refused instead."""
    with pytest.raises(RequestError, match="JSON schema cannot be used"):
        await read(ask("JSON, please.", structure=as_json(schema)))


async def test_calls_tools(tmp_path: Path) -> None:
    """Where the template knows tools, a call streams, its arguments as JSON."""
    file = tmp_path / "tools.gguf"
    file.write_bytes(_with_template(FILE.read_bytes(), _TEMPLATE_WITH_TOOLS))
    model = replace(MODEL, card=read_card(file), tokenizer=file)
    assert engine_traits(engine_spec(), [model]).calls(["general"])
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

    async with running(model, options={"num_slots": 1}) as engine:
        chunks = await read_all(engine, request)
        assert chunks[-1].finish_reason == "tool_calls"
        pieces = [call for chunk in chunks for call in chunk.tool_calls]
        assert len(pieces) > 2
        [call] = join_calls(pieces)
        assert call.name == "get_weather"
        assert json.loads(call.arguments) == {"city": "Paris"}
        assert all(token.top for token in tokens_of(chunks)[:4])


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
