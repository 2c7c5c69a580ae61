"""The OpenAPI document: what every endpoint takes, answers and streams, as named schemas.

Endpoints read their bodies and write their answers themselves; here they say only what these are
like. Tests hold what is served to it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, TypeAlias

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema
from starlette.responses import JSONResponse, Response

_PLACE = "#/components/schemas/"
_KEYS = {"type": "http", "scheme": "bearer", "description": "Needed where `auth.required` is set."}

Shape: TypeAlias = type[Any]
"""A pydantic model or a dataclass."""


class ErrorFacts(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is none."""

    error: ErrorFacts


class _Finite(GenerateJsonSchema):
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
    schema = {"type": "string"} if answers is None else _schema(answers, "serialization")
    content = {media_type: {"schema": schema}}
    if streams:
        events = [_schema(event, "serialization") for event in streams]
        content["text/event-stream"] = {"schema": {"anyOf": events}}
    operation: dict[str, Any] = {
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {
                "description": "What went wrong.",
                "content": {"application/json": {"schema": _schema(errors, "serialization")}},
            },
        }
    }
    if takes is not None:
        body = {"schema": _schema(takes, "validation")}
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
    paths = _gathered(described_by_fastapi["paths"], schemas)
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


def _schema(shape: Shape, mode: Literal["validation", "serialization"]) -> dict[str, Any]:
    """Return a reference to the schema of `shape`, which stands beside it for `_gathered`."""
    plain = issubclass(shape, BaseModel)
    schema = TypeAdapter(shape).json_schema(
        mode=mode,
        ref_template=f"{_PLACE}{{model}}",
        schema_generator=GenerateJsonSchema if plain else _Finite,
    )
    definitions = schema.pop("$defs", {})
    name = shape.__name__
    return {"$ref": f"{_PLACE}{name}", "$defs": {name: schema, **definitions}}


def _gathered(node: Any, schemas: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    """Return `node` without its definitions, which go to `schemas`; a name means one thing."""
    if isinstance(node, list):
        return [_gathered(item, schemas) for item in node]
    if not isinstance(node, dict):
        return node
    for name, schema in node.get("$defs", {}).items():
        assert schemas.setdefault(name, schema) == schema, f"two schemas are called {name}"
    return {key: _gathered(value, schemas) for key, value in node.items() if key != "$defs"}
