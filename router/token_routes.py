"""What a model reads: vLLM's `/tokenize`, `/detokenize`, `/tokenizer_info` and `/version`, and
Anthropic's `/v1/messages/count_tokens`. Nobody answers here, and nothing is recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from models.chat_template import read_prompt_facts, read_tokenizer_config
from models.tokenizer import Tokenizer
from policies.base import Query
from policies.kinds import MOST_COUNT
from policies.plan import Answer
from router.anthropic_api.answer import MessageError, MessagesEndpoint
from router.anthropic_api.request import CountFields, read_count
from router.bodies import Bodies
from router.catalog.catalog import Catalog
from router.decide import most_read, named_target
from router.eligible import among_able
from router.errors import bad_request, to_api_error
from router.executor.task import Prompt
from router.openai_api.chat import ChatEndpoint
from router.openai_api.endpoint import Ask
from router.openai_api.fields import read_fields, read_json
from router.openapi import described
from router.streams import in_json

_MOST_TOKENS = 2**20


class TokenizeFields(BaseModel):
    """A text, or what a chat completion has."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(min_length=1, max_length=256)
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeFields(BaseModel):
    """Token ids of a model."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(min_length=1, max_length=256)
    tokens: list[Annotated[int, Field(ge=0, le=MOST_COUNT)]] = Field(
        max_length=_MOST_TOKENS, fail_fast=True
    )


def _read_prompt(body: bytes) -> tuple[TokenizeFields, Prompt]:
    """Return whose tokens of what are wanted; raises `ApiError`, 400."""
    sent = read_json(body)
    fields = read_fields(TokenizeFields, sent, {})
    if (fields.prompt is None) == (fields.messages is None):
        raise bad_request("either prompt or messages is needed", "prompt")
    if fields.prompt is not None:
        return fields, Prompt(text=fields.prompt)
    [prompt] = ChatEndpoint().read(sent).prompts
    return fields, prompt


def _read_tokens(body: bytes) -> DetokenizeFields:
    return read_fields(DetokenizeFields, read_json(body), {})


class Tokenized(BaseModel):
    """A prompt's token ids, where it was asked for each one's text, and how many tokens the model's
    context holds (null: unknown)."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The text of token ids."""

    prompt: str


class TokenizerFacts(BaseModel):
    """A tokenizer: what tokenizer_config.json says, with the chat template, if there is one."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    vocab_size: int
    chat_template: str | None


class Version(BaseModel):
    """This server's version."""

    version: str


def _facts(tokenizer: Tokenizer, path: Path | None) -> dict[str, Any]:
    """Return what a checkpoint at `path` says of its `tokenizer`, as vLLM tells it."""
    told = {"tokenizer_class": type(tokenizer).__name__, "vocab_size": tokenizer.vocab_size}
    if path is None:
        return {**told, "chat_template": None}
    prompts = read_prompt_facts(path)
    config = read_tokenizer_config(path) if path.is_dir() else prompts.special_tokens
    return {**told, **config, "chat_template": prompts.templates.get("default")}


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
        text=await prompt.query(pool.tokenizer),
        earlier=prompt.earlier(),
        prompt_tokens=await prompt.count(pool.tokenizer),
    )
    decision = await asyncio.to_thread(policy.decide, query)
    decision = await among_able(decision, policy, pool=pool, ask=ask, prompt=prompt)
    return await most_read([decision.plan], pool, prompt)


def add_token_routes(
    api: FastAPI,
    now: Callable[[], Catalog],
    *,
    identify: Callable[[Request], Awaitable[str | None]],
    bodies: Bodies,
) -> None:
    """Add the routes, about what there is `now`.

    As everywhere, policies' prompts are read by the pool's first tokenizer.
    """

    def tokenizer_of(model: str) -> Tokenizer:
        catalog = now()
        named_target(catalog, model)
        known = model in catalog.prices.facts
        return catalog.members.tokenizer_of(model) if known else catalog.members.tokenizer

    async def tokenize(request: Request) -> Response:
        fields, prompt = await bodies.take(request, _read_prompt, await identify(request))
        model, tokenizer = fields.model, tokenizer_of(fields.model)
        if fields.prompt is not None and fields.add_special_tokens is False:
            tokens = await asyncio.to_thread(tokenizer.encode, fields.prompt, special=False)
        else:
            tokens = await prompt.tokens(tokenizer)
        catalog = now()
        known = model in catalog.prices.facts
        context = (
            catalog.members.context_tokens(Answer(members=(model,)))
            if known
            else catalog.members.most_context_tokens
        )

        def told() -> dict[str, Any]:
            texts = map(tokenizer.token_text, tokens) if fields.return_token_strs else None
            return {
                "count": len(tokens),
                "max_model_len": context,
                "tokens": tokens,
                "token_strs": texts and list(texts),
            }

        return Response(await in_json(told, len(tokens)), media_type="application/json")

    async def detokenize(request: Request) -> Response:
        fields = await bodies.take(request, _read_tokens, await identify(request))
        tokenizer = tokenizer_of(fields.model)
        tokens = fields.tokens
        if tokens and max(tokens) >= tokenizer.vocab_size:
            raise bad_request(
                f"tokens: an id is outside of the vocabulary of {tokenizer.vocab_size}", "tokens"
            )
        body = await in_json(lambda: {"prompt": tokenizer.decode(tokens)}, len(tokens))
        return Response(body, media_type="application/json")

    async def tell_tokenizer(request: Request) -> JSONResponse:
        await identify(request)
        catalog = now()
        asked = request.query_params.get("model", catalog.members.first)
        tokenizer = tokenizer_of(asked)
        name = asked if asked in catalog.prices.facts else catalog.members.first
        facts = await asyncio.to_thread(_facts, tokenizer, catalog.pool.model(name).tokenizer)
        return JSONResponse(facts)

    async def tell_version() -> JSONResponse:
        return JSONResponse({"version": version("shoal")})

    async def count_tokens(request: Request) -> JSONResponse:
        """Count the tokens of a conversation as a model reads it."""
        try:
            ask = await bodies.take(request, read_count, await identify(request))
            return JSONResponse({"input_tokens": await _count(now(), ask)})
        except Exception as error:
            told = to_api_error(error)
            return JSONResponse(MessagesEndpoint().error(told), told.status, told.headers)

    counted = described(InputTokens, takes=CountFields, errors=MessageError)
    for path, answer, extra in (
        ("/tokenize", tokenize, described(Tokenized, takes=TokenizeFields)),
        ("/detokenize", detokenize, described(Detokenized, takes=DetokenizeFields)),
        ("/v1/messages/count_tokens", count_tokens, counted),
    ):
        api.add_api_route(path, answer, methods=["POST"], openapi_extra=extra)
    extra = described(TokenizerFacts, query=("model",))
    api.add_api_route("/tokenizer_info", tell_tokenizer, methods=["GET"], openapi_extra=extra)
    api.add_api_route("/version", tell_version, methods=["GET"], openapi_extra=described(Version))
