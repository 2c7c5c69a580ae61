"""`/v1/messages/count_tokens`: how long a conversation is, which nobody answers or records."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from router.anthropic_api.answer import MessagesEndpoint
from router.anthropic_api.request import CountFields, read_count
from router.bodies import Bodies
from router.catalog.catalog import Catalog
from router.decide import named_target
from router.errors import to_api_error


def add_count_route(
    api: FastAPI,
    catalog: Catalog,
    *,
    identify: Callable[[Request], Awaitable[str | None]],
    bodies: Bodies,
) -> None:
    """Add the route; as everywhere, policies' prompts are counted by the pool's first tokenizer."""
    body = {"content": {"application/json": {"schema": CountFields.model_json_schema()}}}

    @api.post("/v1/messages/count_tokens", openapi_extra={"requestBody": body})
    async def count_tokens(request: Request) -> JSONResponse:
        """Count the tokens of a conversation as a model reads it."""
        try:
            await identify(request)
            ask = await bodies.parse(read_count, await bodies.read(request))
            members = catalog.members
            named_target(catalog, ask.model)
            known = ask.model in catalog.prices.facts
            tokenizer = members.tokenizer_of(ask.model) if known else members.tokenizer
            [prompt] = ask.prompts
            return JSONResponse({"input_tokens": len(await prompt.tokens(tokenizer))})
        except Exception as error:
            told = to_api_error(error)
            return JSONResponse(MessagesEndpoint().error(told), told.status, told.headers)
