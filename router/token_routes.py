"""vLLM's `/tokenize`, `/detokenize` and `/version`: what a model reads, which nobody answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from models.tokenizer import Tokenizer
from policies.kinds import MOST_COUNT
from policies.plan import Answer
from router.bodies import read_body
from router.catalog.catalog import Catalog
from router.decide import named_target
from router.executor.task import Prompt
from router.openai_api.chat import ChatEndpoint
from router.openai_api.fields import read_body as read_fields

_MOST_TOKENS = 2**20


class TokenizeFields(BaseModel):
    """A text, or what a chat completion has."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(min_length=1, max_length=256)
    prompt: str | None = None
    messages: list[Any] | None = None


class DetokenizeFields(BaseModel):
    """Token ids of a model."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(min_length=1, max_length=256)
    tokens: list[Annotated[int, Field(ge=0, le=MOST_COUNT)]] = Field(
        max_length=_MOST_TOKENS, fail_fast=True
    )


def add_token_routes(
    api: FastAPI,
    catalog: Catalog,
    *,
    identify: Callable[[Request], Awaitable[str | None]],
    max_body_bytes: int,
) -> None:
    """Add the routes; as everywhere, policies' prompts are read by the pool's first tokenizer."""

    def tokenizer_of(model: str) -> Tokenizer:
        named_target(catalog, model)
        known = model in catalog.prices.facts
        return catalog.members.tokenizer_of(model) if known else catalog.members.tokenizer

    async def tokenize(request: Request) -> JSONResponse:
        await identify(request)
        body = await read_body(request, max_body_bytes)
        fields = await asyncio.to_thread(read_fields, TokenizeFields, body, {})
        if fields.prompt is None:
            [prompt] = (await asyncio.to_thread(ChatEndpoint().parse, body)).prompts
        else:
            prompt = Prompt(text=fields.prompt)
        tokens = await prompt.tokens(tokenizer_of(fields.model))
        known = fields.model in catalog.prices.facts
        context = (
            catalog.members.context_tokens(Answer(members=(fields.model,)))
            if known
            else catalog.members.most_context_tokens
        )
        return JSONResponse(
            {"count": len(tokens), "max_model_len": context, "tokens": tokens, "token_strs": None}
        )

    async def detokenize(request: Request) -> JSONResponse:
        await identify(request)
        body = await read_body(request, max_body_bytes)
        fields = await asyncio.to_thread(read_fields, DetokenizeFields, body, {})
        tokenizer = tokenizer_of(fields.model)
        return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, fields.tokens)})

    async def tell_version() -> JSONResponse:
        return JSONResponse({"version": version("shoal")})

    for path, answer, schema in (
        ("/tokenize", tokenize, TokenizeFields),
        ("/detokenize", detokenize, DetokenizeFields),
    ):
        content = {"application/json": {"schema": schema.model_json_schema()}}
        extra = {"requestBody": {"required": True, "content": content}}
        api.add_api_route(path, answer, methods=["POST"], openapi_extra=extra)
    api.add_api_route("/version", tell_version, methods=["GET"])
