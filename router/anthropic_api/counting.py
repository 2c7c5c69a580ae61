"""`/v1/messages/count_tokens`: how long a conversation is, which nobody answers or records."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse

from router.anthropic_api.answer import MessageError, MessagesEndpoint
from router.anthropic_api.request import CountFields, read_count
from router.bodies import Bodies
from router.catalog.catalog import Catalog
from router.decide import named_target
from router.errors import to_api_error
from router.openapi import described


class InputTokens(BaseModel):
    """How long a conversation is."""

    input_tokens: int


def add_count_route(
    api: FastAPI,
    now: Callable[[], Catalog],
    *,
    identify: Callable[[Request], Awaitable[str | None]],
    bodies: Bodies,
) -> None:
    """Add the route, about what there is `now`.

    As everywhere, policies' prompts are counted by the pool's first tokenizer.
    """
    extra = described(InputTokens, takes=CountFields, errors=MessageError)

    @api.post("/v1/messages/count_tokens", openapi_extra=extra)
    async def count_tokens(request: Request) -> JSONResponse:
        """Count the tokens of a conversation as a model reads it."""
        try:
            await identify(request)
            ask = await bodies.parse(read_count, await bodies.read(request))
            catalog = now()
            members = catalog.members
            named_target(catalog, ask.model)
            known = ask.model in catalog.prices.facts
            [prompt] = ask.prompts
            if known:
                num_tokens = len(await prompt.tokens(members.tokenizer_of(ask.model)))
            else:
                num_tokens = await prompt.count(members.tokenizer)
            return JSONResponse({"input_tokens": num_tokens})
        except Exception as error:
            told = to_api_error(error)
            return JSONResponse(MessagesEndpoint().error(told), told.status, told.headers)
