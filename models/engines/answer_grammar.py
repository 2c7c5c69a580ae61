"""What an answer is held to, as one grammar that llguidance reads: calls, a form of the text, and
thoughts before it.
"""

from __future__ import annotations

import asyncio
import json
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from models.answer_format import AnswerFormat, FormatName, ReasoningTags, Tools
from models.engines.base import GenerationRequest, Structure
from models.engines.json_schema import UnfitSchema, json_rule
from models.errors import RequestError
from models.fair import FairThreads

_HEADER: Final = "%llguidance {}\n"
# What may not stand as it is between slashes; an escape is read with what it escapes.
_IN_SLASHES: Final = re.compile(r"\\.|/|\n", re.DOTALL)
_THREADS: Final = FairThreads(2, "shoal-grammars")
# A rule that leads to another is one more call within its compilation: thousands end the stack, and
# with it the process, which may be llama.cpp's or vLLM's own.
_MOST_RULES: Final = 1000

Function: TypeAlias = Mapping[str, Any]
Terminal: TypeAlias = Callable[[str], str]
"""What stands in a grammar for a tag: its token, where the tokenizer has one."""


def answer_grammar(
    request: GenerationRequest, form: AnswerFormat, terminal: Terminal, *, opened: bool
) -> str | None:
    """Return the grammar of the answer to `request`, in Lark's notation; None if it is free.

    Calls that must be made take the place of any other form; those that may be made stand beside
    it. Where the prompt `opened` the reasoning, it comes first and is free.

    Raises `RequestError` for a form in a notation that cannot be read, and a schema that no answer
    could be held to.
    """
    try:
        return _answer_grammar(request, form, terminal, opened=opened)
    except UnfitSchema as error:
        raise _unusable(request, str(error)) from None


def _answer_grammar(
    request: GenerationRequest, form: AnswerFormat, terminal: Terminal, *, opened: bool
) -> str | None:
    tools = request.tools
    structure = request.sampling.structure
    forced = tools is not None and tools.choice != "auto"
    if not forced and structure is None:
        return None
    tags = form.reasoning if opened else None
    if structure is not None and tools is None and tags is None:
        return _structure_grammar(structure)
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
    return f"{_HEADER}start: {start}\n" + "".join(rules)


async def compiled(tokenizer: LLTokenizer, grammar: str, request: GenerationRequest) -> LLMatcher:
    """Return what follows the `grammar` of the answer to `request`; takes up to some seconds.

    On threads of its own, for clients in turn: whoever sends many that take long waits for them.

    Raises `RequestError` that names the field of what it is held to.
    """
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_THREADS, compile_answer, tokenizer, grammar, request)


def compile_answer(tokenizer: LLTokenizer, grammar: str, request: GenerationRequest) -> LLMatcher:
    """Do what `compiled` does, on the thread that calls."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0)  # releases the interpreter's lock
    if matcher.is_error():
        told = matcher.get_error().strip().splitlines()
        raise _unusable(request, told[0] if told else "unknown")
    return matcher


def _unusable(request: GenerationRequest, why: str) -> RequestError:
    tools, structure = request.tools, request.sampling.structure
    if structure is None or (tools is not None and tools.choice != "auto"):
        what, field = "functions' parameters", "tools"
    else:
        what = "JSON schema" if structure.kind == "json" else structure.kind
        field = structure.field
    return RequestError(f"{field}: the {what} cannot be used: {why}", field)


def _form(structure: Structure) -> str:
    if structure.kind == "json":
        return f"form: {json_rule(structure.text, strict=structure.strict)}\n"
    inner = _structure_grammar(structure).removeprefix(_HEADER)
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
    if len(properties) > _MOST_RULES:  # each has a rule, which leads to the next's
        raise UnfitSchema(f"{function['name']!r} takes more than {_MOST_RULES} arguments")
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


def _structure_grammar(structure: Structure) -> str:
    """Return the grammar of `structure`, in Lark's notation; nothing has been checked.

    Raises `RequestError` for a grammar in a notation that cannot be read.
    """
    if structure.kind == "json":
        return f"{_HEADER}start: {json_rule(structure.text, strict=structure.strict)}\n"
    if structure.kind == "regex":
        return f"{_HEADER}start: /{_IN_SLASHES.sub(_escaped, structure.text)}/\n"
    if structure.kind == "choice":
        choices = (json.dumps(choice) for choice in json.loads(structure.text))
        return f"{_HEADER}start: {' | '.join(choices)}\n"
    try:
        lark = str(any_to_lark(structure.text))
    except Exception as error:  # the converter raises whatever it stumbles over
        field = structure.field
        raise RequestError(f"{field}: the grammar cannot be read: {error}", field) from None
    if lark.count(":") > _MOST_RULES:
        field = structure.field
        raise RequestError(f"{field}: the grammar has more than {_MOST_RULES} rules", field)
    return lark if lark.startswith("%llguidance") else _HEADER + lark


def _escaped(found: re.Match[str]) -> str:
    return {"/": "\\/", "\n": "\\n"}.get(found[0][-1], found[0])
