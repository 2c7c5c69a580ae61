"""The OpenAPI document: what every endpoint takes, answers and streams, as named schemas.

Endpoints read their bodies and write their answers themselves; here they say only what these are
like. Tests hold what is served to it. Schemas are worked out when somebody asks for the document:
all of them take a second, which a replica that starts has no time for.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, TypeAlias

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, NoDefault
from pydantic_core import core_schema
from starlette.responses import JSONResponse, Response

_PLACE = "#/components/schemas/"
_KEYS = {"type": "http", "scheme": "bearer", "description": "Needed where `auth.required` is set."}

Shape: TypeAlias = type[Any]
"""A pydantic model or a dataclass."""
Mode: TypeAlias = Literal["validation", "serialization"]

_SHAPES: dict[str, tuple[Shape, Mode]] = {}  # what operations refer to, by name


TOLD_WHOLE = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)
"""Of what is told with all of its fields, those too that have a default here."""


class ErrorFacts(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is none."""

    error: ErrorFacts


class Listing(BaseModel):
    """A list, whose entries are its `data`."""

    object: Literal["list"]


class Page(Listing):
    """A part of a longer list; `last_id` is what `after` takes to go on."""

    first_id: str | None
    last_id: str | None
    has_more: bool


class _Schema(GenerateJsonSchema):
    """Leaves out that a default is null, which says nothing to a client."""

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:  # noqa: ANN401
        """Return the default, or that there is none."""
        found = super().get_default_value(schema)
        return NoDefault if found is None else found


class _Finite(_Schema):
    """Says of dataclasses' numbers that they may be null: so are told NaN and infinity."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """Return a number's schema, or null's."""
        return {**super().float_schema(schema), "type": ["number", "null"]}


def described(
    answers: Shape | None,
    *,
    takes: Shape | None = None,
    streams: tuple[Shape, ...] = (),
    errors: Shape = ErrorBody,
    media_type: str = "application/json",
    query: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return an operation's part of the document, for FastAPI's `openapi_extra`.

    The answer has a shape, or (None) is anything of the `media_type`. A stream is server-sent
    events whose data has one of the shapes of `streams`. `query` are its optional parameters.
    """
    schema: dict[str, Any] = {"type": "string"} if answers is None else _reference(answers)
    content = {media_type: {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": {"anyOf": [*map(_reference, streams)]}}
    operation: dict[str, Any] = {
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {
                "description": "What went wrong.",
                "content": {"application/json": {"schema": _reference(errors)}},
            },
        }
    }
    if takes is not None:
        body = {"schema": _reference(takes, "validation")}
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    if query:
        operation["parameters"] = [
            {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}
            for name in query
        ]
    return operation


def document(described_by_fastapi: dict[str, Any]) -> dict[str, Any]:
    """Return the whole document: every schema under its name, and who may ask."""
    schemas: dict[str, Any] = {}
    paths = described_by_fastapi["paths"]
    _gather(paths, schemas)
    for operations in paths.values():
        for operation in operations.values():
            # FastAPI would refuse parameters so; ours are texts, which it never does.
            operation["responses"].pop("422", None)
    return {
        **described_by_fastapi,
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"key": _KEYS},
        },
        "security": [{}, {"key": []}],
    }


def describe(api: FastAPI) -> None:
    """Have `api` serve our document in place of FastAPI's own, written once."""
    by_fastapi, path = api.openapi, api.openapi_url
    assert path is not None
    api.openapi = cache(lambda: document(by_fastapi()))  # type: ignore[method-assign]
    written = cache(lambda: bytes(JSONResponse(api.openapi()).body))

    def openapi() -> Response:
        return Response(written(), media_type="application/json")

    # FastAPI's own route writes it for every request, on the event loop; this one has a thread.
    api.router.routes[:] = [one for one in api.routes if getattr(one, "path", None) != path]
    api.add_api_route(path, openapi, include_in_schema=False)


def _reference(shape: Shape, mode: Mode = "serialization") -> dict[str, str]:
    """Return a reference to the schema of `shape`; a name means one thing."""
    name = shape.__name__
    assert _SHAPES.setdefault(name, (shape, mode)) == (shape, mode), f"two are called {name}"
    return {"$ref": f"{_PLACE}{name}"}


def _schemas(shape: Shape, mode: Mode) -> dict[str, Any]:
    """Return the schema of `shape`, and those that it refers to, by their names."""
    schema = TypeAdapter(shape).json_schema(
        mode=mode,
        ref_template=f"{_PLACE}{{model}}",
        schema_generator=_Schema if issubclass(shape, BaseModel) else _Finite,
    )
    return {**schema.pop("$defs", {}), shape.__name__: schema}


def _gather(node: Any, schemas: dict[str, Any]) -> None:  # noqa: ANN401 - JSON
    """Put the schemas that are referred to in `node` into `schemas`."""
    if isinstance(node, list):
        for item in node:
            _gather(item, schemas)
    elif isinstance(node, dict):
        name = str(node.get("$ref", "")).removeprefix(_PLACE)
        if name in _SHAPES and name not in schemas:
            for found, schema in _schemas(*_SHAPES[name]).items():
                assert schemas.setdefault(found, schema) == schema, f"two are called {found}"
        for value in node.values():
            _gather(value, schemas)
