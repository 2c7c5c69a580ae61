"""What an answer is held to, as one grammar: calls, a form of the text, and thoughts before it."""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from llguidance import LLMatcher, LLTokenizer

from models.answer_format import AnswerFormat, ReasoningTags
from models.engines.base import GenerationRequest, Structure
from models.engines.structure import HEADER, compile_grammar, json_rule, write_grammar
from models.tools import FormatName, Tools

Function: TypeAlias = Mapping[str, Any]
Terminal: TypeAlias = Callable[[str], str]
"""What stands in a grammar for a tag: its token, where the tokenizer has one."""


def answer_grammar(
    request: GenerationRequest, form: AnswerFormat, terminal: Terminal, *, opened: bool
) -> str | None:
    """Return the grammar of the answer to `request`, in Lark's notation; None if it is free.

    Calls that must be made take the place of any other form; those that may be made stand beside
    it. Where the prompt `opened` the reasoning, it comes first and is free.

    Raises `RequestError` for a form in a notation that cannot be read.
    """
    tools = request.tools
    structure = request.sampling.structure
    forced = tools is not None and tools.choice != "auto"
    if not forced and structure is None:
        return None
    tags = form.reasoning if opened else None
    if structure is not None and tools is None and tags is None:
        return write_grammar(structure)
    rules: list[str] = []
    answers: list[str] = []
    if tools is not None and form.calls is not None:
        answers.append("calls")
        rules.append(call_rules(tools, form.calls, terminal))
    if structure is not None and not forced:
        answers.append("form")
        rules.append(_form(structure))
    start = " | ".join(answers)
    if tags is not None:
        start = f"thoughts ({start})"
        rules.append(_thoughts(tags, terminal))
    return f"{HEADER}start: {start}\n" + "".join(rules)


def compile_answer(tokenizer: LLTokenizer, grammar: str, request: GenerationRequest) -> LLMatcher:
    """Return what follows the `grammar` of the answer to `request`; takes up to a second.

    Raises `RequestError` that names the field of what it is held to.
    """
    tools, structure = request.tools, request.sampling.structure
    if tools is not None and tools.choice != "auto":
        what, field = "functions' parameters", "tools"
    else:
        assert structure is not None, "there is no other reason for a grammar"
        what = "JSON schema" if structure.kind == "json" else structure.kind
        field = structure.field
    return compile_grammar(tokenizer, grammar, what=what, field=field)


def _form(structure: Structure) -> str:
    if structure.kind == "json":
        return f"form: {json_rule(structure.text, strict=structure.strict)}\n"
    inner = write_grammar(structure).removeprefix(HEADER)
    return f"form: %lark {{\n{inner}\n}}\n"


def _thoughts(tags: ReasoningTags, terminal: Terminal) -> str:
    """Return the rule of any text up to the end of the reasoning, and a few blanks after it."""
    end = terminal(tags.close)
    if end.startswith("<["):
        return f"thoughts: /(?s:.*)/ {end} /[ \\n]{{0,4}}/\n"
    return f"thoughts: thought /[ \\n]{{0,4}}/\nthought[suffix={end}]: /(?s:.*)/\n"


def call_rules(tools: Tools, form: FormatName, terminal: Terminal) -> str:
    """Return rules, in Lark's notation, of which `calls` is what `tools` let the model call.

    That is one call of the function that `tool_choice` names; else of any, and several calls where
    they are wanted in parallel and the format knows such. Arguments follow the functions' schemas.
    """
    parallel = tools.parallel
    functions = [tool["function"] for tool in tools.functions]
    if not isinstance(tools.choice, str):
        name = tools.choice["function"]["name"]
        functions = [function for function in functions if function["name"] == name]
        parallel = False
    return _RULES[form](functions, terminal, parallel)


def _hermes(functions: Sequence[Function], terminal: Terminal, parallel: bool) -> str:
    call = f'{terminal("<tool_call>")} "\\n" object "\\n" {terminal("</tool_call>")}'
    several = ' ("\\n" call)*' if parallel else ""
    return f"calls: call{several}\ncall: {call}\n{_objects(functions)}"


def _llama3(functions: Sequence[Function], terminal: Terminal, parallel: bool) -> str:  # noqa: ARG001
    # Its templates know one call in each turn, and no terminal.
    return f"calls: object\n{_objects(functions, key='parameters')}"


def _mistral(functions: Sequence[Function], terminal: Terminal, parallel: bool) -> str:
    several = ' (", " object)*' if parallel else ""
    return f'calls: {terminal("[TOOL_CALLS]")} "[" object{several} "]"\n{_objects(functions)}'


def _pythonic(functions: Sequence[Function], terminal: Terminal, parallel: bool) -> str:  # noqa: ARG001
    several = ' (", " call)*' if parallel else ""
    each = " | ".join(f"call_{i}" for i in range(len(functions)))
    rules = [f'calls: "[" call{several} "]"', f"call: {each}"]
    for number, function in enumerate(functions):
        rules += _python_call(number, function)
    return "\n".join(rules) + "\n"


_RULES: dict[FormatName, Callable[[Sequence[Function], Terminal, bool], str]] = {
    "hermes": _hermes,
    "llama3-json": _llama3,
    "mistral": _mistral,
    "pythonic": _pythonic,
}


def _objects(functions: Sequence[Function], *, key: str = "arguments") -> str:
    """Return the rules of which `object` is a call in JSON."""
    rules = ["object: " + " | ".join(f"object_{i}" for i in range(len(functions)))]
    for number, function in enumerate(functions):
        name = json.dumps(function["name"], ensure_ascii=False)
        head = json.dumps(f'{{"name": {name}, "{key}": ', ensure_ascii=False)
        rules.append(f'object_{number}: {head} arguments_{number} "}}"')
        schema = json.dumps(_parameters(function))
        rules.append(f"arguments_{number}: {json_rule(schema, strict=_is_strict(function))}")
    return "\n".join(rules) + "\n"


def _python_call(number: int, function: Function) -> Iterator[str]:
    """Yield the rules of a call: the properties in their order, those not required may lack."""
    parameters = _parameters(function)
    required = parameters.get("required") or ()
    properties = {
        key: schema if isinstance(schema, dict) else {}
        for key, schema in parameters["properties"].items()
        if key.isidentifier() and not keyword.iskeyword(key)
    }
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    name = json.dumps(f"{function['name']}(", ensure_ascii=False)
    yield f'call_{number}: {name} first_{number}_0 ")"'
    for index, (key, schema) in enumerate(properties.items()):
        rule, following = f"{number}_{index}", f"{number}_{index + 1}"
        written = json_rule(json.dumps({**schema, **shared}), strict=_is_strict(function))
        yield f"value_{rule}: {written}"
        given = f'"{key}=" value_{rule} next_{following}'
        lacking = () if key in required else (f"first_{following}", f"next_{following}")
        yield " | ".join((f"first_{rule}: {given}", *lacking[:1]))
        yield " | ".join((f'next_{rule}: ", " {given}', *lacking[1:]))
    yield f'first_{number}_{len(properties)}: ""'
    yield f'next_{number}_{len(properties)}: ""'


def _parameters(function: Function) -> dict[str, Any]:
    """Return the schema of a function's arguments: an object, of named properties if it has any."""
    given = function.get("parameters")
    schema = {"type": "object", "properties": {}, **(given or {})}
    if not given or schema["properties"]:
        schema.setdefault("additionalProperties", False)
    return schema


def _is_strict(function: Function) -> bool:
    return function.get("strict") is True
