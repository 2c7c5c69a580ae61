"""Requests of OpenAI's Responses API, and the chat requests that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from router.errors import bad_request
from router.openai_api.chat import ChatEndpoint, ChatFields
from router.openai_api.constraints import MAX_TOOLS
from router.openai_api.endpoint import Ask, Extension
from router.openai_api.fields import Metadata, few, read_fields, read_json, text_or, texts_of

# Known fields that cannot be honoured, each with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "enable_response_messages": (False,),
    "max_tool_calls": (),
    "moderation": (),
    "previous_input_messages": ([],),
    "prompt": (),
    "stream_options": ({}, {"include_obfuscation": False}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_IN_CHATS = ChatFields.model_fields.keys() - {"logprobs", "n", "stream_options", "top_logprobs"}
# What may be asked for beside the answer, though there is none of it here.
_INCLUDED = ("reasoning.encrypted_content",)
_TEXTS = {
    **dict.fromkeys(
        ("input_text", "output_text", "text", "summary_text", "reasoning_text"), "text"
    ),
    "refusal": "refusal",
}


class ResponsesFields(BaseModel):
    """The body of a response; `shoal` is this server's extension."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(min_length=1)
    input: Annotated[str | list[dict[str, Any]], text_or("items")]
    include: list[str] | None = Field(None, max_length=16, fail_fast=True)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: dict[str, Any] | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    text: dict[str, Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    top_p: float | None = Field(None, ge=0, le=1)
    user: str | None = None
    shoal: Annotated[Extension | None, few(32)] = None


@dataclass(frozen=True, kw_only=True)
class ResponseAsk(Ask):
    """A chat request, the `fields` that it was made of, and those of the response that repeat them.

    `items` are the whole conversation; with `store` they and the answer are kept.
    """

    fields: ResponsesFields
    items: Sequence[Mapping[str, Any]]
    store: bool
    echoed: Mapping[str, Any]


def read_response_fields(body: bytes, *, can_store: bool) -> ResponsesFields:
    """Return what a body of `/v1/responses` says; raises `ApiError`, 400.

    Nothing can be kept, or have been kept, unless the server `can_store`.
    """
    fields = read_fields(ResponsesFields, read_json(body), _REFUSED)
    _check(fields, can_store=can_store)
    return fields


def response_ask(
    fields: ResponsesFields, *, store: bool, before: Sequence[Mapping[str, Any]] = ()
) -> ResponseAsk:
    """Return what `fields` ask for after the items `before`; raises `ApiError`, 400.

    `max_output_tokens` is a ceiling: an answer may be shorter where the model's context ends. How
    much to say is told to those servers alone that know such a field.
    """
    said = fields.input
    items = [*before, *([{"role": "user", "content": said}] if isinstance(said, str) else said)]
    chat = {
        "model": fields.model,
        "messages": _turns(fields.instructions, items),
        "max_tokens": fields.max_output_tokens,
        "parallel_tool_calls": fields.parallel_tool_calls,
        "reasoning_effort": (fields.reasoning or {}).get("effort"),
        "response_format": _response_format(fields.text or {}),
        "shoal": fields.shoal and fields.shoal.model_dump(exclude_unset=True),
        "stream": fields.stream,
        "temperature": fields.temperature,
        "tool_choice": _tool_choice(fields.tool_choice),
        "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.tools or ())] or None,
        "top_p": fields.top_p,
        "user": fields.user,
    }
    # What vLLM has beside OpenAI's fields means what it means in a chat.
    extra = fields.model_extra or {}
    more = {name: extra[name] for name in _IN_CHATS & extra.keys()}
    told = {name: value for name, value in {**more, **chat}.items() if value is not None}
    ask = ChatEndpoint().read(told)
    hints = {
        "verbosity": (fields.text or {}).get("verbosity"),
    }
    sent = {**told, **{name: hint for name, hint in hints.items() if hint is not None}}
    return ResponseAsk(
        **vars(replace(ask, sent=sent, ceiling=True)),
        fields=fields,
        items=items,
        store=store,
        echoed={**_echoed(fields), "store": store},
    )


def _check(fields: ResponsesFields, *, can_store: bool) -> None:
    for name in fields.include or ():
        if name not in _INCLUDED:
            raise bad_request(
                f"include: {name!r} is not supported by this server; allowed are "
                f"{', '.join(_INCLUDED)}",
                "include",
                "unsupported_parameter",
            )
    for name, asked in (
        ("store", fields.store),
        ("previous_response_id", fields.previous_response_id),
    ):
        if asked and not can_store:
            raise bad_request(
                f"{name} is not supported: this server keeps no responses (responses.store); "
                "send the whole conversation as input",
                name,
                "unsupported_parameter",
            )


def _turns(instructions: str | None, items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation as a chat has it: calls and thoughts belong to assistants' turns."""
    turns: list[dict[str, Any]] = []
    if instructions:
        turns.append({"role": "system", "content": instructions})
    thoughts = ""
    for index, item in enumerate(items):
        where = f"input[{index}]"
        kind = item.get("type") or "message"
        if kind == "reasoning":
            thoughts += _text(item.get("content") or item.get("summary") or "", where)
        elif kind == "message":
            turn = {"role": item.get("role"), "content": _content(item.get("content"), where)}
            if thoughts and turn["role"] == "assistant":
                turn["reasoning_content"], thoughts = thoughts, ""
            turns.append(turn)
        elif kind == "function_call":
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": None})
            if thoughts:
                turns[-1]["reasoning_content"], thoughts = thoughts, ""
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            turns[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            told = _text(item.get("output") or "", f"{where}.output")
            turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": told})
        else:
            raise bad_request(
                f"{where}.type: {kind!r} is not supported; allowed are message, reasoning, "
                "function_call, function_call_output",
                f"{where}.type",
                "unsupported_parameter",
            )
    return turns


def _content(content: object, where: str) -> str | list[dict[str, Any]]:
    """Return a message's content; whether a model takes pictures is not decided here."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return _text(content, f"{where}.content")
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        if isinstance(part, Mapping) and part.get("type") == "input_image":
            url = {"url": part.get("image_url"), "detail": part.get("detail") or "auto"}
            parts.append({"type": "image_url", "image_url": url})
        else:
            parts.append({"type": "text", "text": _text([part], f"{where}.content[{index}]")})
    return parts


def _text(content: object, where: str) -> str:
    """Return the text of a content; raises `ApiError`, 400, for parts that are none."""
    return "\n".join(texts_of(content, where, entry="part", kinds=_TEXTS))


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise bad_request(
            f"{where}.type: {tool.get('type')!r} is not supported by this server; only function is",
            f"{where}.type",
            "unsupported_parameter",
        )
    names = ("name", "description", "parameters", "strict")
    told = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": told}


def _tool_choice(choice: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if choice is None or isinstance(choice, str):
        return choice
    if choice.get("type") == "allowed_tools":
        some = choice.get("tools")
        tools = [
            _tool(tool, "tool_choice.tools")
            for tool in (some if isinstance(some, list) else ())
            if isinstance(tool, Mapping)
        ]
        allowed = {"mode": choice.get("mode"), "tools": tools}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    if choice.get("type") != "function":
        raise bad_request(
            f"tool_choice.type: {choice.get('type')!r} is not supported by this server; "
            "only function and allowed_tools are",
            "tool_choice.type",
            "unsupported_parameter",
        )
    return {"type": "function", "function": {"name": choice.get("name")}}


def _response_format(text: Mapping[str, Any]) -> dict[str, Any] | None:
    wanted = text.get("format")
    if wanted is None:
        return None
    if not isinstance(wanted, Mapping):
        raise bad_request("text.format: must be an object", "text.format")
    if wanted.get("type") != "json_schema":
        return {"type": wanted.get("type")}
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in wanted.items() if name != "type"},
    }


def _echoed(fields: ResponsesFields) -> dict[str, Any]:
    return {
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": fields.previous_response_id,
        "reasoning": fields.reasoning or {"effort": None, "summary": None},
        "temperature": 1.0 if fields.temperature is None else fields.temperature,
        "text": fields.text or {"format": {"type": "text"}},
        "tool_choice": fields.tool_choice or "auto",
        "tools": fields.tools or [],
        "top_p": 1.0 if fields.top_p is None else fields.top_p,
        "truncation": "disabled",
        "user": fields.user,
    }
