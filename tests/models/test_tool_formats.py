"""Calls as models write them, read however the stream is cut, and the templates that show them."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.answer_format import (
    AnswerFormat,
    FormatName,
    ReasoningTags,
    ToolCall,
    detect_format,
    join_calls,
)
from models.tool_formats import READERS

NAMES = ("get_weather", "add", "write_file")
PARIS = ("get_weather", {"city": "Paris"})
BERLIN = ("get_weather", {"city": "Berlin", "days": 3})
CODE = ("write_file", {"path": "a.py", "text": 'if x["a"] == "}":\n    print("[\\"]")\n'})
CODE_JSON = json.dumps(CODE[1])

# What models of each format wrote (Qwen2.5, Qwen3, Hermes 2 Pro; Llama 3.1; Mistral 7B v0.3 and
# Small 3.2; Llama 3.2 and 4), the text beside the calls, and the calls.
RECORDED: list[tuple[FormatName, str, str, list[tuple[str, Any]]]] = [
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [PARIS],
    ),
    (
        "hermes",
        "I'll look both up.\n\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Berlin", "days": 3}}\n'
        "</tool_call>",
        "I'll look both up.",
        [PARIS, BERLIN],
    ),
    (
        "hermes",
        '<tool_call>\n{"arguments": {"city": "Paris"}, "name": "get_weather"}\n</tool_call>\n',
        "",
        [PARIS],
    ),
    (
        "hermes",
        f'<tool_call>{{"name": "write_file", "arguments": {CODE_JSON}}}</tool_call>',
        "",
        [CODE],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", {"a": 1})],
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    ("hermes", "1 < 2, and <tool> is a tag.", "1 < 2, and <tool> is a tag.", []),
    ("hermes", "<tool_call> is how I call.\n", "<tool_call> is how I call.\n", []),
    ("llama3-json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (
        "llama3-json",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "get_weather", "parameters": {"city": "Berlin", "days": 3}}',
        "",
        [PARIS, BERLIN],
    ),
    ("llama3-json", '{"name": "Bob", "age": 7}', '{"name": "Bob", "age": 7}', []),
    ("llama3-json", '{"a": {"name": "add"}}', '{"a": {"name": "add"}}', []),
    ("llama3-json", "Use {braces}.", "Use {braces}.", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}, '
        '{"name": "get_weather", "arguments": {"city": "Berlin", "days": 3}, "id": "0UPVJ6aQ2"}]',
        "",
        [PARIS, BERLIN],
    ),
    (
        "mistral",
        'Sure.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_weather'
        '{"city": "Berlin", "days": 3}',
        "Sure.",
        [PARIS, BERLIN],
    ),
    ("mistral", "[1, 2] [TOOL", "[1, 2] [TOOL", []),
    (
        "pythonic",
        "[get_weather(city='Paris'), get_weather(city=\"Berlin\", days=3)]",
        "",
        [PARIS, BERLIN],
    ),
    (
        "pythonic",
        "<|python_start|>[add(a=[1, 2.5, -3], b={'x': None, 'y': True}, c=false)]<|python_end|>",
        "",
        [("add", {"a": [1, 2.5, -3], "b": {"x": None, "y": True}, "c": False})],
    ),
    ("pythonic", f"[write_file(path='a.py', text={json.dumps(CODE[1]['text'])})]", "", [CODE]),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]", []),
    ("pythonic", "[x(a=1)] is no call", "[x(a=1)] is no call", []),
    ("pythonic", "[add(open('f'))]", "[add(open('f'))]", []),
]


def _read(
    form: FormatName, pieces: list[str], *, truncated: bool = False
) -> tuple[str, list[ToolCall]]:
    reader = READERS[form](NAMES)
    told = [*map(reader.push, pieces), reader.finish(truncated=truncated)]
    return "".join(text for text, _ in told), [call for _, calls in told for call in calls]


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize(("form", "written", "text", "calls"), RECORDED)
def test_answers_are_read_wherever_they_are_cut(
    data: st.DataObject, form: FormatName, written: str, text: str, calls: list[Any]
) -> None:
    """Text and calls come out the same, whole or in any pieces; a piece's id comes first."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(written)))))
    pieces = [written[a:b] for a, b in zip([0, *cuts], [*cuts, len(written)], strict=True)]
    for parts in (pieces, list(written)):
        told, found = _read(form, parts)
        whole = join_calls(found)
        assert told == text
        assert [(call.name, json.loads(call.arguments)) for call in whole] == calls
        assert [call.index for call in whole] == list(range(len(calls)))
        assert all(len(call.id) == 9 and call.id.isalnum() for call in whole)


def test_arguments_come_as_they_are_written() -> None:
    """A call is told with its name, and its arguments do not wait for their end."""
    reader = READERS["hermes"](NAMES)
    _, [call] = reader.push('<tool_call>\n{"name": "add", ')
    assert (call.name, call.arguments) == ("add", "")
    _, [more] = reader.push('"arguments": {"a": 1')
    assert (more.id, more.arguments) == ("", '{"a": 1')


@pytest.mark.parametrize("form", get_args(FormatName))
def test_a_truncated_call_is_no_text(form: FormatName) -> None:
    """What was cut off shows as far as it is a call, and never as text."""
    written = next(text for name, text, _, calls in RECORDED if name == form and calls)
    for end in range(len(written)):
        text, calls = _read(form, [written[:end]], truncated=True)
        assert "add" not in text and "get_weather" not in text
        assert len(join_calls(calls)) <= 2


@settings(max_examples=50)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("form", get_args(FormatName))
def test_any_text_is_read(form: FormatName, text: str) -> None:
    """Nothing that a model writes fails, and what calls nothing comes back whole."""
    told, calls = _read(form, list(text))
    assert calls or told == text


HERMES = (
    "{% if tools %}For each function call, return a json object within <tool_call></tool_call>"
    "{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        (HERMES, "hermes", None),
        (HERMES + "{{ '<think>' }}{{ content.split('</think>') }}", "hermes", "<think>"),
        (
            '{% if tools %}Respond in the format {"name": function name, "parameters": '
            "dictionary of argument name and its value}.{% endif %}",
            "llama3-json",
            None,
        ),
        (
            "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS][THINK][/THINK]",
            "mistral",
            "[THINK]",
        ),
        (
            "{{ tools }}[func_name1(params_name1=params_value1), func_name2(params)]",
            "pythonic",
            None,
        ),
        ("{% if tools %}<tool_call>\n<function=example>{% endif %}", None, None),
        ("{{ messages }}", None, None),
    ],
)
def test_formats_are_read_off_templates(
    template: str, calls: str | None, reasoning: str | None
) -> None:
    """Each template shows how its model calls, and what thoughts stand between."""
    found = detect_format([template])
    assert (found.calls, found.reasoning and found.reasoning.open) == (calls, reasoning)


def test_marks_are_those_of_the_format() -> None:
    """Tags that may be special tokens are read all the same."""
    tags = ReasoningTags(open="<think>", close="</think>")
    marks = AnswerFormat(calls="mistral", reasoning=tags).marks
    assert set(marks) == {"[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"}
