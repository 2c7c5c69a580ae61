"""`/v1/messages/count_tokens`: how long a conversation is, which nobody answers or records."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse

from policies.base import Query
from router.anthropic_api.answer import MessageError, MessagesEndpoint
from router.anthropic_api.request import CountFields, read_count
from router.bodies import Bodies
from router.catalog.catalog import Catalog
from router.decide import most_read, named_target
from router.eligible import among_able
from router.errors import to_api_error
from router.openai_api.endpoint import Ask
from router.openapi import described


class InputTokens(BaseModel):
    """How long a conversation is."""

    input_tokens: int


async def _count(catalog: Catalog, ask: Ask) -> int:
    """Return the tokens that `ask` has for who would answer it; of several, for who reads most.

    A policy with a budget decides by what it has spent, so that any of its models may.
    """
    target, [prompt] = named_target(catalog, ask.model), ask.prompts
    policy, pool = target.policy, catalog.members
    if target.policy_name is None:
        return len(await prompt.tokens(pool.tokenizer_of(ask.model)))
    if target.policy_name in catalog.policies.controllers:
        return await most_read(policy.plans(), pool, prompt)
    query = Query(
        text=prompt.query(pool.tokenizer),
        earlier=prompt.earlier(),
        prompt_tokens=await prompt.count(pool.tokenizer),
    )
    decision = await asyncio.to_thread(policy.decide, query)
    decision = await among_able(decision, policy, pool=pool, ask=ask, prompt=prompt)
    return await most_read([decision.plan], pool, prompt)


def add_count_route(
    api: FastAPI,
    now: Callable[[], Catalog],
    *,
    identify: Callable[[Request], Awaitable[str | None]],
    bodies: Bodies,
) -> None:
    """Add the route, about what there is `now`."""
    extra = described(InputTokens, takes=CountFields, errors=MessageError)

    @api.post("/v1/messages/count_tokens", openapi_extra=extra)
    async def count_tokens(request: Request) -> JSONResponse:
        """Count the tokens of a conversation as a model reads it."""
        try:
            ask = await bodies.take(request, read_count, await identify(request))
            return JSONResponse({"input_tokens": await _count(now(), ask)})
        except Exception as error:
            told = to_api_error(error)
            return JSONResponse(MessagesEndpoint().error(told), told.status, told.headers)
