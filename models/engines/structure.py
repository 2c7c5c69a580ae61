"""Grammars of what answers are held to, as llguidance reads them: ours and llama.cpp's.

Between the tokens of JSON at most `_BLANKS` characters of white space are allowed: a model that
likes blanks would otherwise spend its whole answer on them. For the same reason objects whose
properties are named have no others, unless their schema speaks of others.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any, Final

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from models.engines.base import Structure
from models.errors import RequestError

HEADER: Final = "%llguidance {}\n"
_BLANKS: Final = 8
_OF_SCHEMAS: Final = {"items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf"}
_OF_NAMED_SCHEMAS: Final = {"properties", "patternProperties", "$defs", "definitions"}
_SPEAKS_OF_OTHERS: Final = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"),
    *("minProperties", "anyOf", "oneOf", "if", "$ref", "dependentSchemas"),
}
_LOOKS_AROUND: Final = re.compile(r"\(\?<?[=!]")
_JSON_OPTIONS: Final = {"whitespace_pattern": f"[ \\n\\t\\r]{{1,{_BLANKS}}}"}


def write_grammar(structure: Structure) -> str:
    """Return the grammar of `structure`, in Lark's notation; nothing has been checked.

    Raises `RequestError` for a grammar in a notation that cannot be read.
    """
    if structure.kind == "json":
        return f"{HEADER}start: {json_rule(structure.text, strict=structure.strict)}\n"
    if structure.kind == "regex":
        escaped = structure.text.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n")
        return f"{HEADER}start: /{escaped}/\n"
    if structure.kind == "choice":
        choices = (json.dumps(choice) for choice in json.loads(structure.text))
        return f"{HEADER}start: {' | '.join(choices)}\n"
    try:
        lark = str(any_to_lark(structure.text))
    except Exception as error:  # the converter raises whatever it stumbles over
        field = structure.field
        raise RequestError(f"{field}: the grammar cannot be read: {error}", field) from None
    return lark if lark.startswith("%llguidance") else HEADER + lark


def json_rule(schema: str, *, strict: bool = False) -> str:
    """Return what a rule of a grammar says for a JSON text that `schema` describes.

    What a grammar cannot hold is ignored, unless `strict`.
    """
    # Each part of an `allOf` knows some of the properties only.
    content = _read(json.loads(schema), closes='"allOf"' not in schema, strict=strict)
    if isinstance(content, dict):
        own = content.get("x-guidance")
        options = {**(own if isinstance(own, dict) else {}), **_JSON_OPTIONS}
        content = {**content, "x-guidance": {**options, "lenient": not strict}}
    return f"%json {json.dumps(content)}"


def _read(schema: Any, *, closes: bool, strict: bool) -> Any:  # noqa: ANN401 - any JSON
    """Return `schema` as grammars take it.

    With `closes`, objects are closed that name properties and say nothing of others. Unless
    `strict`, patterns that look around go: Rust's regular expressions cannot, and pydantic's
    decimals do.
    """
    again = partial(_read, closes=closes, strict=strict)
    if isinstance(schema, list):
        return [again(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in _OF_SCHEMAS & found.keys():
        found[key] = again(found[key])
    for key in _OF_NAMED_SCHEMAS & found.keys():
        if isinstance(found[key], dict):
            found[key] = {name: again(one) for name, one in found[key].items()}
    if not strict and _LOOKS_AROUND.search(str(found.get("pattern", ""))):
        del found["pattern"]
    named, required = found.get("properties"), found.get("required") or ()
    closes = closes and isinstance(named, dict) and all(name in named for name in required)
    if closes and not _SPEAKS_OF_OTHERS & found.keys():
        found["additionalProperties"] = False
    return found


def compile_grammar(tokenizer: LLTokenizer, grammar: str, *, what: str, field: str) -> LLMatcher:
    """Return what follows `grammar`; takes up to a second, and releases the interpreter's lock.

    Raises `RequestError` that names `field` for a grammar that is not valid or not supported.
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        told = matcher.get_error().strip().splitlines()
        raise RequestError(
            f"{field}: the {what} cannot be used: {told[0] if told else 'unknown'}", field
        )
    return matcher
