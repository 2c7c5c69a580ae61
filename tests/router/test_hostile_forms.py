"""What an answer is held to is bounded before it is compiled, however it is nested."""

from typing import Any

import pytest

from tests.router.conftest import Running

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "a?" * 6_000 + "a" * 6_000
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": LONG}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
MANY = {"anyOf": [{"patternProperties": {"a?" * 500 + str(i): {}}} for i in range(20)]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guided_regex": LONG}, "guided_regex"),
        ({"structured_outputs": {"regex": LONG}}, "structured_outputs"),
        ({"guided_grammar": "start: /" + LONG * 3 + "/"}, "guided_grammar"),
        ({"guided_json": SCHEMA}, "guided_json"),
        ({"guided_json": DEEP}, "guided_json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": MANY}}},
            "response_format",
        ),
        ({"tools": [TOOL]}, "tools"),
    ],
)
def test_what_would_take_long_to_compile_is_refused(
    server: Running, fields: dict[str, Any], named: str
) -> None:
    """Regular expressions take memory with the square of their length, wherever they stand."""
    told = server.post(**fields)
    assert told.status_code == 400
    assert told.json()["error"]["param"] == named


def test_arguments_of_calls_may_be_nested_however_deep(server: Running) -> None:
    """They are text, which a template gets as it is where it cannot be read."""
    function = {"name": "f", "arguments": DEEP}
    turns = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "y"},
    ]
    assert server.post(messages=turns).status_code in (200, 400)
