"""What a request holds its answer to: functions that may be called, and the form of its text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic_core import from_json

from models.answer_format import Tools
from models.engines.base import Structure
from router.errors import bad_request

MAX_TOOLS = 128  # OpenAI's
_MOST_CHARACTERS = {"json": 2**18, "choice": 2**18, "regex": 2**13, "grammar": 2**15}
# Of all regular expressions in a request's schemas. To compile one may take time and memory with
# the square of its length: 24,000 characters half a second and a quarter of a gigabyte.
_MOST_PATTERN_CHARACTERS = 2**13
_MOST_CHOICES = 1024
_MOST_TOLD = 16  # names of functions in an error
_TOOL_CHOICES = ("none", "auto", "required")
_KINDS = ("json", "regex", "choice", "grammar")


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    *,
    parallel: bool = True,
) -> Tools | None:
    """Return what may be called; None for nothing. Raises `ApiError`, 400."""
    names = [_name(tool, "tools") for tool in tools or ()]
    _check_patterns(tools, "tools")
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        choice, allowed = _allowed(choice, names)
        tools = [tool for tool, name in zip(tools or (), names, strict=True) if name in allowed]
    if isinstance(choice, Mapping):
        if (name := _name(choice, "tool_choice")) not in names:
            raise bad_request(f"tool_choice: {_lacking(name, names)}", "tool_choice")
    elif choice is not None and choice not in _TOOL_CHOICES:
        raise bad_request(
            f"tool_choice: {choice!r} is unknown; allowed are {', '.join(_TOOL_CHOICES)}, or a "
            "function",
            "tool_choice",
        )
    if choice == "required" and not names:
        raise bad_request("tool_choice: required needs tools", "tool_choice")
    if not tools or choice == "none":
        return None
    return Tools(
        functions=tuple(tools), choice="auto" if choice is None else choice, parallel=parallel
    )


def _allowed(choice: Mapping[str, Any], names: Sequence[str]) -> tuple[str, set[str]]:
    """Return the choice among some of the functions called `names`, and which these are."""
    given = choice.get("allowed_tools")
    asked: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    mode, some = asked.get("mode"), asked.get("tools")
    if mode not in ("auto", "required") or not isinstance(some, list) or not some:
        raise bad_request(
            "tool_choice.allowed_tools needs a mode, auto or required, and a list of tools",
            "tool_choice.allowed_tools",
        )
    allowed = {_name(tool, "tool_choice.allowed_tools.tools") for tool in some}
    for name in allowed.difference(names):
        raise bad_request(f"tool_choice.allowed_tools: {_lacking(name, names)}", "tool_choice")
    return str(mode), allowed


def _check_patterns(schemas: object, field: str) -> None:
    """Refuse more of regular expressions in `schemas` than can be compiled at once."""
    num_characters, left = 0, [schemas]
    while left:
        one = left.pop()
        if isinstance(one, list | tuple):
            left.extend(one)
        elif isinstance(one, dict):
            named = one.get("patternProperties")
            for pattern in (one.get("pattern"), *(named if isinstance(named, dict) else ())):
                num_characters += len(pattern) if isinstance(pattern, str) else 0
            left.extend(one.values())
    if num_characters > _MOST_PATTERN_CHARACTERS:
        raise bad_request(
            f"{field}: its patterns have {num_characters} characters together; at most "
            f"{_MOST_PATTERN_CHARACTERS} are allowed",
            field,
        )


def _lacking(name: str, names: Sequence[str]) -> str:
    told = ", ".join(names[:_MOST_TOLD]) + (", ..." if len(names) > _MOST_TOLD else "")
    return f"tools lack {name!r}; " + (f"they have {told}" if told else "there are none")


def read_structure(
    response_format: Mapping[str, Any] | None,
    structured_outputs: Mapping[str, Any] | None,
    guided: Mapping[str, Any],
) -> Structure | None:
    """Return the form that one of three ways of asking names: OpenAI's, vLLM's, vLLM's older one.

    `guided` are the `guided_*` fields by what follows. Raises `ApiError`, 400, that names the
    field, also where two of them ask for something.
    """
    found = {
        "response_format": _of_format(response_format),
        "structured_outputs": _of_outputs(structured_outputs),
        **{f"guided_{kind}": _of_kind(f"guided_{kind}", kind, v) for kind, v in guided.items()},
    }
    asked = {name: structure for name, structure in found.items() if structure is not None}
    if len(asked) > 1:
        first, second = list(asked)[:2]
        raise bad_request(f"{second}: {first} asks for another form already", second)
    for name, structure in asked.items():
        most = _MOST_CHARACTERS[structure.kind]
        if len(structure.text) > most:
            raise bad_request(f"{name}: it has more than {most} characters", name)
        if structure.kind == "json":
            _check_patterns(from_json(structure.text), name)
        return replace(structure, field=name)
    return None


def _of_format(value: Mapping[str, Any] | None) -> Structure | None:
    kind = None if value is None else value.get("type")
    if value is None or kind == "text":
        return None
    if kind == "json_object":
        return Structure(kind="json", text='{"type":"object"}')
    if kind != "json_schema":
        raise bad_request(
            f"response_format.type {kind!r} is unknown; allowed are text, json_object, json_schema",
            "response_format.type",
        )
    wanted = value.get("json_schema")
    if not isinstance(wanted, dict) or not isinstance(wanted.get("schema"), dict):
        raise bad_request(
            "response_format.json_schema needs a schema object", "response_format.json_schema"
        )
    strict, name = wanted.get("strict"), wanted.get("name")
    if not isinstance(strict, bool | None):
        raise bad_request(
            "response_format.json_schema.strict is not true or false",
            "response_format.json_schema.strict",
        )
    return Structure(
        kind="json",
        text=json.dumps(wanted["schema"]),
        strict=bool(strict),
        name=name if isinstance(name, str) else None,
    )


def _of_outputs(value: Mapping[str, Any] | None) -> Structure | None:
    given = {key: item for key, item in (value or {}).items() if item not in (None, False)}
    if given == {"json_object": True}:
        return Structure(kind="json", text='{"type":"object"}')
    for key in given:
        if key not in _KINDS or len(given) > 1:
            raise bad_request(
                f"structured_outputs: {key!r} is unknown or one too many; allowed is one of "
                f"{', '.join(_KINDS)}, json_object",
                "structured_outputs",
            )
    return next((_of_kind("structured_outputs", k, item) for k, item in given.items()), None)


def _of_kind(field: str, kind: str, value: object) -> Structure | None:
    """Return the structure of a `kind` that vLLM knows."""
    if value is None:
        return None
    if kind == "json" and isinstance(value, dict | bool):
        return Structure(kind="json", text=json.dumps(value))
    if kind == "json" and isinstance(value, str):
        try:
            from_json(value)
        except ValueError:
            raise bad_request(f"{field}: it is no JSON schema", field) from None
        return Structure(kind="json", text=value)
    if kind == "regex" and isinstance(value, str):
        return Structure(kind="regex", text=value)
    if kind == "grammar" and isinstance(value, str):
        return Structure(kind="grammar", text=value)
    choices = kind == "choice" and isinstance(value, list) and 0 < len(value) <= _MOST_CHOICES
    if choices and isinstance(value, list) and all(isinstance(c, str) and c for c in value):
        return Structure(kind="choice", text=json.dumps(value))
    wanted = {
        "json": "a JSON schema",
        "choice": f"a list of 1 to {_MOST_CHOICES} strings, none of them empty",
    }.get(kind, "a string")
    raise bad_request(f"{field}: {kind} must be {wanted}", field)


def _name(tool: Mapping[str, Any], param: str) -> str:
    """Return the name of the function that `tool` is."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name or tool.get("type") != "function":
        raise bad_request(f"{param}: a tool is of type function and names one", param)
    if not isinstance(function, Mapping) or not isinstance(
        function.get("parameters"), Mapping | None
    ):
        raise bad_request(f"{param}: the parameters of {name!r} are no JSON schema", param)
    return name
