"""Tools and reasoning on random weights: what a grammar forces must come out as a call."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import AddedToken

from models.answer_format import FormatName, Tools, join_calls
from models.chat_template import Rendering
from models.engines.base import Chunk, GenerationRequest, SamplingOptions, Structure
from models.errors import RequestError
from models.tokenizer import CheckpointTokenizer
from tests.models.engines.stacked.tiny import answer, build_engine, build_tokenizer, save_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Berlin"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "kind": {"$ref": "#/$defs/Kind"},
    },
    "required": ["city"],
    "$defs": {"Kind": {"type": "boolean"}},
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
MESSAGES = ({"role": "user", "content": "hello"},)

_TURNS = (
    "{% for m in messages %}<|user|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant {% if enable_thinking %}<think>\n{% endif %}"
    "{% endif %}"
)
# How the templates of Qwen, Llama, Mistral and Llama 3.2 tell of tools, in short.
TEMPLATES: dict[str, str] = {
    "hermes": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    '{% if tools %}<tool_call>\n{"name": <function-name>}\n</tool_call>{% endif %}',
    "llama3-json": "{% for t in tools or [] %}{{ t | tojson(indent=4) }}{% endfor %}{% if tools %}"
    'Respond in the format {"name": function name, "parameters": dictionary}.{% endif %}',
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{% endif %}{% endfor %}",
    "pythonic": "{% if tools %}{{ tools | tojson }}"
    "[func_name1(params_name1=params_value1), func_name2(params)]{% endif %}",
}
ADDED = (
    AddedToken("<tool_call>", special=False),
    AddedToken("</tool_call>", special=False),
    AddedToken("[TOOL_CALLS]", special=True),
    AddedToken("<think>", special=False),
    AddedToken("</think>", special=False),
)
END_OF_THOUGHT = 300


def _save(folder: Path, form: str, seed: int = 0) -> Path:
    save_checkpoint(folder, seed=seed, max_position_embeddings=1024)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(ADDED))
    assert tokenizer.token_to_id("</think>") == END_OF_THOUGHT
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    thinks = "{% if false %}</think>{% endif %}"
    (folder / "chat_template.jinja").write_text(TEMPLATES[form] + _TURNS + thinks)
    return folder


def _request(
    folder: Path,
    request_id: str,
    members: Sequence[str] = ("m0",),
    *,
    tools: Tools | None = None,
    rendering: Rendering | None = None,
    **sampling: Any,
) -> GenerationRequest:
    rendering = rendering or Rendering()
    functions = tools.functions if tools else ()
    return GenerationRequest(
        request_id=request_id,
        prompt_tokens=CheckpointTokenizer(folder).encode_chat(MESSAGES, functions, rendering),
        members=tuple(members),
        messages=MESSAGES,
        rendering=rendering,
        tools=tools,
        sampling=SamplingOptions(**{"max_tokens": 200, "seed": 1, **sampling}),
    )


def _join(chunks: list[Chunk]) -> tuple[str, list[tuple[str, Any]]]:
    calls = join_calls(call for chunk in chunks for call in chunk.tool_calls)
    text = "".join(chunk.text for chunk in chunks)
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("form", get_args(FormatName))
def test_forced_calls_are_calls(tmp_path: Path, form: FormatName) -> None:
    """Random members, alone and fused, call what they must with arguments of its schema."""
    folders = [_save(tmp_path / str(seed), form, seed) for seed in range(2)]
    named = {"type": "function", "function": {"name": "now"}}
    required = Tools(functions=(WEATHER, NOW), choice="required", parallel=False)
    asked = [
        _request(folders[0], "alone", tools=required),
        _request(folders[0], "fused", ("m0", "m1"), tools=required, seed=2),
        _request(folders[0], "named", tools=Tools(functions=(WEATHER, NOW), choice=named)),
    ]
    alone, fused, of_that_name = answer(build_engine(folders), *asked)
    for chunks in (alone, fused):
        text, [(name, arguments)] = _join(chunks)
        assert (text, chunks[-1].finish_reason) == ("", "tool_calls")
        assert name in ("get_weather", "now")
        assert name == "now" or arguments["city"] in ("Paris", "Berlin")
        assert set(arguments) <= set(SCHEMA["properties"])
    assert _join(of_that_name) == ("", [("now", {})])


def test_members_that_call_in_different_ways_are_not_fused(tmp_path: Path) -> None:
    """Each can call alone; together there is no one way."""
    folders = [_save(tmp_path / form, form) for form in ("hermes", "pythonic")]
    tools = Tools(functions=(NOW,), choice="required")
    with pytest.raises(RequestError, match="cannot call"):
        answer(build_engine(folders), _request(folders[0], "r", ("m0", "m1"), tools=tools))


def test_calls_that_may_be_made_are_read(tmp_path: Path) -> None:
    """Beside a form of the text, a call is free; a truncated one ends by length."""
    folder = _save(tmp_path / "m", "hermes")
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    said = Structure(kind="choice", text=json.dumps([call]))
    tools = Tools(functions=(NOW,))
    whole, cut = answer(
        build_engine([folder]),
        _request(folder, "whole", tools=tools, structure=said, temperature=0.0),
        _request(folder, "cut", tools=tools, structure=said, max_tokens=30, temperature=0.0),
    )
    assert (*_join(whole), whole[-1].finish_reason) == ("", [("now", {})], "tool_calls")
    assert cut[-1].finish_reason == "length"
    assert "".join(chunk.text for chunk in cut) == ""


def test_a_form_holds_after_the_reasoning(tmp_path: Path) -> None:
    """Where the prompt opens the reasoning, thoughts are free, and the answer follows its form."""
    folder = _save(tmp_path / "m", "hermes")
    rendering = Rendering(arguments={"enable_thinking": True})
    end = {"logit_bias": {END_OF_THOUGHT: 6.0}, "rendering": rendering}
    said = Structure(kind="choice", text='["yes"]')
    tools = Tools(functions=(NOW,), choice="required", parallel=False)
    form, calls, completion = answer(
        build_engine([folder]),
        _request(folder, "form", structure=said, **end),
        _request(folder, "calls", tools=tools, **end),
        _request(folder, "no thoughts", structure=said),
    )
    assert _join(form)[0] == "yes"
    assert _join(calls)[1] == [("now", {})]
    for chunks in (form, calls):
        thoughts = [t for chunk in chunks for t in chunk.tokens if t.thought]
        assert chunks[-1].reasoning_tokens == len(thoughts) > 0
        assert thoughts[-1].token_id == END_OF_THOUGHT
    assert (_join(completion)[0], completion[-1].reasoning_tokens) == ("yes", 0)
