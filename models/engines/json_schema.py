"""JSON schemas as grammars take them, and what of them no grammar could hold: refused by name.

Between the tokens of JSON at most `_BLANKS` characters of white space are allowed: a model that
likes blanks would otherwise spend its whole answer on them. For the same reason objects whose
properties are named have no others, unless their schema speaks of others.

Grammars read all numbers of a schema as doubles. So integers' bounds are moved inwards to the next
ones that a double holds, and a constant that none holds is refused: another would be written.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

_BLANKS: Final = 8
_JSON_OPTIONS: Final = {"whitespace_pattern": f"[ \\n\\t\\r]{{1,{_BLANKS}}}"}
_OF_SCHEMAS: Final = {"items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf"}
_OF_NAMED_SCHEMAS: Final = {"properties", "patternProperties", "$defs", "definitions"}
_DEFINITIONS: Final = {"$defs", "definitions"}
_SPEAKS_OF_OTHERS: Final = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"),
    *("minProperties", "anyOf", "oneOf", "if", "$ref", "dependentSchemas"),
}
_LOOKS_AROUND: Final = re.compile(r"\(\?<?[=!]")
_LARGEST: Final = 2**63 - 1024  # the largest double that fits into 64 bits
_MOST_CHARACTERS: Final = 2**18
_MOST_LEVELS: Final = 1000
# At schemas that refer to others, for one answer; what is left then is let go.
_MOST_LOOKS: Final = 100_000


class UnfitSchema(ValueError):
    """Says why no answer can be held to a schema, or none would end."""


def json_rule(schema: str, *, strict: bool = False) -> str:
    """Return what a rule of a grammar says for a JSON text that `schema` describes.

    What a grammar cannot hold is ignored, unless `strict`. Raises `UnfitSchema`.
    """
    if len(schema) > _MOST_CHARACTERS:
        raise UnfitSchema(f"it has more than {_MOST_CHARACTERS} characters")
    given = json.loads(schema)
    targets = _targets(given)
    _check_depth(given, targets)
    _check_ends(targets)
    # Each part of an `allOf` knows some of the properties only.
    content = _read(given, closes='"allOf"' not in schema, strict=strict)
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
    for key in ("const", "enum"):
        _check_constant(key, found.get(key))
    if "integer" in _types(found) and "number" not in _types(found):
        found = _with_bounds(found)
    named, required = found.get("properties"), found.get("required") or ()
    closes = closes and isinstance(named, dict) and all(name in named for name in required)
    if closes and not _SPEAKS_OF_OTHERS & found.keys():
        found["additionalProperties"] = False
    return found


def _types(schema: Mapping[str, Any]) -> list[Any]:
    """Return the types that a schema names; none where it leaves them open."""
    named = schema.get("type", [])
    return named if isinstance(named, list) else [named]


def _check_constant(key: str, value: object) -> None:
    """Refuse an integer that a grammar would write as another."""
    if isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            _check_constant(key, one)
    elif isinstance(value, int) and not (abs(value) <= _LARGEST and int(float(value)) == value):
        raise UnfitSchema(
            f"{key} {_told(value)}: no double is this integer, and answers are held to doubles; "
            "let it be a string"
        )


def _with_bounds(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return an integer's schema with the bounds that doubles hold, none of them exclusive."""
    found = dict(schema)
    for key, sign in (("minimum", -1), ("maximum", 1)):
        limits = []  # turned round for minima, so that the least is the narrowest
        for name, apart in ((key, 0), (f"exclusive{key.capitalize()}", 1)):
            value = schema.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if value in (math.inf, -math.inf) or sign * value < -_LARGEST:
                raise UnfitSchema(f"{name} {_told(value)}: integers of 64 bits can be had, no more")
            limits.append(math.floor(sign * value) - (apart if value == int(value) else 0))
            del found[name]
        if limits:
            found[key] = sign * _double_at_most(min(limits))
    return found


def _double_at_most(value: int) -> int:
    """Return the largest integer up to `value` that a double holds and 64 bits do."""
    value = min(value, _LARGEST)
    double = float(value)
    return int(double if double <= value else math.nextafter(double, -math.inf))


def _told(value: float) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _targets(schema: object) -> dict[str, object]:
    """Return what answers may be held to beside the `schema` itself, by the references to it."""
    targets: dict[str, object] = {}
    left = [schema]
    while left:
        one = left.pop()
        left.extend(_parts(one))
        ref = one.get("$ref") if isinstance(one, dict) else None
        if isinstance(ref, str) and ref not in targets:
            targets[ref] = _resolved(schema, ref)
            left.append(targets[ref])
    return targets


def _check_depth(schema: object, targets: Mapping[str, object]) -> None:
    """Refuse a schema by which compilers of grammars call themselves until the stack ends.

    Each goes into what a schema refers to when it first meets it. So counted are the levels of the
    longest way along references and, of what leads to itself, those of all together.
    """
    levels, uses = {}, {}
    for name, one in {"": schema, **targets}.items():
        levels[name], found = _levels(one)
        uses[name] = found & targets.keys()
    users = defaultdict(list)
    num_open = {name: len(found) for name, found in uses.items()}
    for name, found in uses.items():
        for ref in found:
            users[ref].append(name)
    depths: dict[str, int] = {}
    ready = [name for name, number in num_open.items() if not number]
    while ready:
        name = ready.pop()
        depths[name] = levels[name] + max((depths[ref] for ref in uses[name]), default=0)
        for user in users[name]:
            num_open[user] -= 1
            if not num_open[user]:
                ready.append(user)
    circular = sum(number for name, number in levels.items() if name not in depths)
    if circular + max(depths.values(), default=0) > _MOST_LEVELS:
        raise UnfitSchema(f"its references lead through more than {_MOST_LEVELS} levels")


def _levels(schema: object) -> tuple[int, set[str]]:
    """Return how many mappings stand within each other, but for definitions, and the references."""
    deepest, refs = 0, set[str]()
    left = [(schema, 0)]
    while left:
        one, level = left.pop()
        if isinstance(one, dict):
            level += 1
            deepest = max(deepest, level)
            ref = one.get("$ref")
            refs.update([ref] if isinstance(ref, str) else [])
            left.extend((part, level) for key, part in one.items() if key not in _DEFINITIONS)
        elif isinstance(one, list):
            left.extend((part, level) for part in one)
    return deepest, refs


def _check_ends(targets: Mapping[str, object]) -> None:
    """Refuse a schema that refers to one which no JSON that ends could fulfil.

    An answer would stop where it begins, as a reference to itself does, or go on for ever.
    """
    open_refs, ending, num_looks = list(targets), set[str](), 0
    while open_refs and num_looks < _MOST_LOOKS:
        num_looks += len(open_refs)
        ending.update(ref for ref in reversed(open_refs) if _ends(targets[ref], ending))
        still = [ref for ref in open_refs if ref not in ending]
        if len(still) == len(open_refs):
            raise UnfitSchema(f"no JSON that ends can be what $ref {still[0]!r} leads to")
        open_refs = still


def _parts(schema: object) -> Iterator[object]:
    """Yield the schemas in `schema` that an answer may be held to, but for definitions."""
    if isinstance(schema, list):
        yield from schema
    if isinstance(schema, dict):
        yield from (schema[key] for key in _OF_SCHEMAS & schema.keys())
        for key in (_OF_NAMED_SCHEMAS - _DEFINITIONS) & schema.keys():
            yield from schema[key].values() if isinstance(schema[key], dict) else ()


def _resolved(schema: object, ref: str) -> object:
    """Return what a reference within `schema` leads to; True, anything, where nothing is found."""
    if not ref.startswith("#"):
        return True
    found: Any = schema
    for part in ref.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            return True
    return found


def _ends(schema: object, ending: set[str]) -> bool:
    """Return whether some JSON that ends fulfils `schema`, where references to `ending` have such.

    A part that fulfils nothing counts only where JSON cannot do without it.
    """
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return schema is not False
    if isinstance(schema.get("$ref"), str) and schema["$ref"] not in ending:
        return False
    if not all(_ends(one, ending) for one in _listed(schema, "allOf")):
        return False
    for key in ("anyOf", "oneOf"):
        if key in schema and not any(_ends(one, ending) for one in _listed(schema, key)):
            return False
    types = _types(schema)
    if not types or set(types) - {"object", "array"}:
        return True
    return ("object" in types and _object_ends(schema, ending)) or (
        "array" in types and _array_ends(schema, ending)
    )


def _object_ends(schema: Mapping[str, Any], ending: set[str]) -> bool:
    named = schema.get("properties")
    named = named if isinstance(named, dict) else {}
    return all(_ends(named.get(str(name), True), ending) for name in _listed(schema, "required"))


def _array_ends(schema: Mapping[str, Any], ending: set[str]) -> bool:
    fewest = schema.get("minItems")
    if not isinstance(fewest, int) or fewest < 1:
        return True
    first = _listed(schema, "prefixItems")
    rest = [schema.get("items", True)] if fewest > len(first) else []
    return all(_ends(one, ending) for one in [*first[:fewest], *rest])


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []
