"""What a JSON schema holds answers to, byte by byte, and what is refused since nothing could."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from llguidance import LLTokenizer, TokenizerWrapper

from models.answer_format import PLAIN, AnswerFormat, Tools
from models.engines.answer_grammar import answer_grammar, compile_answer
from models.engines.base import GenerationRequest, SamplingOptions, Structure, StructureKind
from models.errors import RequestError

LARGEST = 2**63 - 1024  # of the integers of 64 bits that are doubles


class _Bytes:
    """A token per byte, and one that ends."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def asking(form: object, kind: StructureKind = "json") -> GenerationRequest:
    """A request of an answer that is held to a schema, or to a text of another `kind`."""
    text = json.dumps(form) if kind == "json" else str(form)
    return GenerationRequest(
        request_id="r",
        prompt_tokens=(1,),
        members=("m",),
        sampling=SamplingOptions(structure=Structure(kind=kind, text=text)),
    )


def grammar_of(request: GenerationRequest) -> str:
    """The grammar of its answer, on any engine."""
    grammar = answer_grammar(request, PLAIN, lambda mark: mark, opened=False)
    assert grammar is not None
    return grammar


def allows(schema: object, answer: str) -> bool:
    """Whether `answer` is whole and one that the schema allows."""
    request = asking(schema)
    matcher = compile_answer(TOKENIZER, grammar_of(request), request)
    tokens = list(answer.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
EITHER = {"anyOf": [{"type": "null"}, {"$ref": "#"}]}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "object", "properties": {"x": {"$ref": "#/properties/x"}}},
        {"$ref": "#/$defs/node", "$defs": {"node": {**NODE, "required": ["next"]}}},
        {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
        {"type": "array", "minItems": 2, "prefixItems": [{}], "items": {"anyOf": [{"$ref": "#"}]}},
        {"allOf": [{"type": "integer"}, {"$ref": "#/$defs/a~1b"}],
         "$defs": {"a/b": {"oneOf": [{"$ref": "#/$defs/a~1b"}]}}},
    ],
)  # fmt: skip
def test_what_no_json_that_ends_fulfils_is_refused_by_its_reference(schema: Any) -> None:
    """The answer would be half a JSON."""
    with pytest.raises(RequestError, match=r"response_format: .*no JSON that ends.*\$ref '#") as no:
        allows(schema, "1")
    assert no.value.param == "response_format"


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, '{"next":{"next":{}}}'),
        (
            {"type": "object", "properties": {"x": EITHER}, "required": ["x"]},
            '{"x":{"x":{"x":null}}}',
        ),
        ({"type": "array", "items": {"$ref": "#"}}, "[[],[[]]]"),
        ({"type": ["array", "string"], "items": {"$ref": "#"}, "minItems": 1}, '["a",["b"]]'),
        # Nobody refers to what would never end.
        ({"type": "integer", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "1"),
    ],
)
def test_what_may_end_may_refer_to_itself(schema: Any, answer: str) -> None:
    """Lists, trees and alternatives."""
    assert allows(schema, answer)


PROPERTY = {"type": "object", "required": ["x"]}


def chain(length: int, last: Any, *, reverse: bool = False) -> dict[str, Any]:
    """A schema of so many definitions, each of which leads to the next, in either order."""
    names = [f"d{number}" for number in range(length)]
    defined = {
        name: {**PROPERTY, "properties": {"x": {"$ref": f"#/$defs/{after}"}}}
        for name, after in pairwise([*names, "end"])
    } | {"end": last}
    return {
        "$ref": "#/$defs/d0",
        "$defs": dict(reversed(defined.items())) if reverse else defined,
    }


@pytest.mark.parametrize("reverse", [False, True])
def test_references_may_lead_through_hundreds_of_schemas(reverse: bool) -> None:
    """More than any program writes; whether an answer would end is known, however they stand."""
    answer = '{"x":' * 300 + "7" + "}" * 300
    assert allows(chain(300, {"type": "integer"}, reverse=reverse), answer)
    with pytest.raises(RequestError, match="no JSON that ends"):
        allows(chain(300, {"$ref": "#/$defs/d0"}, reverse=reverse), answer)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "last", [{"type": "integer"}, {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/d0"}]}]
)
def test_references_through_thousands_of_schemas_are_refused(last: Any, reverse: bool) -> None:
    """Each is one more call within its compiler's others: the process ended where the stack did."""
    with pytest.raises(RequestError, match="lead through more than 1000 levels"):
        allows(chain(1500, last, reverse=reverse), "7")


def test_many_schemas_beside_each_other_are_no_depth() -> None:
    """Four hundred definitions, each of which an answer may have."""
    defined = {f"d{n}": {"type": "object", "properties": {"x": {}}} for n in range(400)}
    beside = {name: {"$ref": f"#/$defs/{name}"} for name in defined}
    schema = {"type": "object", "properties": beside, "$defs": defined}
    assert allows(schema, '{"d7":{"x":1}}')


def test_a_grammar_of_thousands_of_rules_is_refused() -> None:
    """As with schemas; hundreds may follow each other."""
    for number, refused in ((500, False), (1500, True)):
        rules = "".join(f'r{n}: "a" r{n + 1}\n' for n in range(number))
        request = asking(f'start: r0\n{rules}r{number}: "b"\n', kind="grammar")
        if refused:
            with pytest.raises(RequestError, match="more than 1000 rules"):
                grammar_of(request)
        else:
            matcher = compile_answer(TOKENIZER, grammar_of(request), request)
            tokens = list(b"a" * number + b"b")
            assert matcher.try_consume_tokens(tokens) == len(tokens)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        # What OpenAPI's int64 and uint64 are bounded by.
        (
            {"minimum": -(2**63), "maximum": 2**63 - 1},
            [-LARGEST, -1, 0, LARGEST],
            [2**63, -(2**63) - 1],
        ),
        ({"minimum": 0, "maximum": 2**64 - 1}, [0, LARGEST], [-1, 2**64]),
        ({"minimum": -(2**70)}, [-LARGEST, 5], []),
        ({"minimum": 2**53 + 1}, [2**53 + 2], [2**53]),
        ({"maximum": 2**60 + 1}, [2**60, -(2**60)], [2**60 + 2]),
        ({"exclusiveMaximum": 2**60}, [2**59], [2**60]),
        ({"exclusiveMinimum": -(2**60), "minimum": -(2**61)}, [0], [-(2**60)]),
        ({"minimum": 0.5, "exclusiveMaximum": 3}, [1, 2], [0, 3]),
        ({"exclusiveMinimum": 1.5, "maximum": 1e19}, [2], [1]),
    ],
)
def test_an_integers_bounds_hold_however_large(
    bounds: dict[str, float], inside: list[int], outside: list[int]
) -> None:
    """Between two doubles the narrower one is held to."""
    schema = {"type": "integer", **bounds}
    assert [value for value in inside if not allows(schema, str(value))] == []
    assert [value for value in outside if allows(schema, str(value))] == []


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 2**70}, f"minimum {2**70}: integers of 64 bits"),
        ({"type": "integer", "exclusiveMaximum": -(10**400)}, "exclusiveMaximum -1000"),
        ({"type": "integer", "maximum": float("-inf")}, "maximum -inf: integers of 64 bits"),
        ({"const": 1234567890123456789}, "const 1234567890123456789: no double"),
        ({"enum": ["a", {"id": [2**53 + 1]}]}, f"enum {2**53 + 1}: no double"),
        ({"anyOf": [{"enum": [2**64]}]}, f"enum {2**64}: no double"),
    ],
)
def test_numbers_that_would_become_others_are_refused(schema: Any, words: str) -> None:
    """A grammar would write 1234567890123456768 for the first constant."""
    with pytest.raises(RequestError, match=f"JSON schema cannot be used: {words}"):
        allows(schema, "1")


@pytest.mark.parametrize("value", [2**53, 2**62, -(10**18), 0.1, 1e22, True, None, "x"])
def test_other_constants_are_written_as_they_are(value: Any) -> None:
    """Among them every integer that a double holds."""
    told = json.dumps(value) if value != 1e22 else "1" + 22 * "0"
    assert allows({"const": value}, told)


def test_functions_of_thousands_of_arguments_are_refused() -> None:
    """Where each is a rule of its own, as in calls that are written in Python."""
    many = {"type": "object", "properties": {f"a{n}": {} for n in range(1500)}}
    function = {"type": "function", "function": {"name": "f", "parameters": many}}
    request = GenerationRequest(
        request_id="r",
        prompt_tokens=(1,),
        members=("m",),
        tools=Tools(functions=(function,), choice="required"),
    )
    with pytest.raises(RequestError, match=r"tools: .* 'f' takes more than 1000 arguments"):
        answer_grammar(request, AnswerFormat(calls="pythonic"), json.dumps, opened=False)


def test_parameters_of_functions_are_refused_as_tools() -> None:
    """They are held to schemas, too."""
    looping = {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}
    function = {"type": "function", "function": {"name": "f", "parameters": looping}}
    request = GenerationRequest(
        request_id="r",
        prompt_tokens=(1,),
        members=("m",),
        tools=Tools(functions=(function,), choice="required"),
    )
    with pytest.raises(RequestError, match="tools: the functions' parameters cannot") as refused:
        answer_grammar(request, AnswerFormat(calls="hermes"), json.dumps, opened=False)
    assert refused.value.param == "tools"
