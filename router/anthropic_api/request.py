"""Requests of Anthropic's Messages API, and the chat requests that they stand for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from router.errors import ApiError, bad_request
from router.openai_api.chat import MAX_MESSAGES, ChatEndpoint
from router.openai_api.constraints import MAX_TOOLS
from router.openai_api.endpoint import Ask, Extension
from router.openai_api.fields import MAX_STOPS, few, read_fields, read_json, text_or, texts_of

# Known fields that cannot be honoured, each with the values that ask for nothing. What only tunes
# Anthropic's own servers (cache_control, service_tier, context_management, ...) is passed over.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "compaction": (),
    "container": (),
    "fallbacks": ([],),
    "inference_geo": ("global",),
    "mcp_servers": ([],),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "thread": (),
}
_FOR_TEMPLATES = ("reasoning_effort", "chat_template_kwargs", "continue_final_message")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class MessageParam(BaseModel):
    """One turn: a text or a list of content blocks."""

    model_config = ConfigDict(strict=True)

    role: Literal["user", "assistant", "system"]
    content: Annotated[str | list[dict[str, Any]], text_or("blocks")]


class Tool(BaseModel):
    """A function of the client's own; Anthropic's server tools have other types."""

    model_config = ConfigDict(strict=True)

    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(BaseModel):
    """Which function must be called, if any."""

    model_config = ConfigDict(strict=True)

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountFields(BaseModel):
    """The body of `/v1/messages/count_tokens`: a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(min_length=1)
    messages: list[MessageParam] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    system: Annotated[str | list[dict[str, Any]], text_or("blocks")] | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: ToolChoice | None = None

    def chat(self) -> dict[str, Any]:
        """Return the body of a chat completion that asks the same; raises `ApiError`, 400."""
        body: dict[str, Any] = {"model": self.model, "messages": list(self._turns())}
        last = body["messages"][-1]
        if last["role"] == "assistant" and last["content"] and not last.get("tool_calls"):
            body["continue_final_message"] = True  # the answer begins as the client says
        if self.tools:
            body["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools)]
        choice = self.tool_choice
        if choice is not None:
            body["tool_choice"] = _CHOICES.get(choice.type) or {
                "type": "function",
                "function": {"name": choice.name or ""},
            }
            if choice.disable_parallel_tool_use:
                body["parallel_tool_calls"] = False
        return body

    def _turns(self) -> Iterator[dict[str, Any]]:
        if self.system:
            text = _text(self.system, "system")
            yield {"role": "system", "content": text}
        for index, message in enumerate(self.messages):
            where = f"messages[{index}].content"
            if message.role == "assistant":
                yield _assistant(message.content, where)
            elif message.role == "system":
                yield {"role": "system", "content": _text(message.content, where)}
            else:
                yield from _user(message.content, where)


class MessagesFields(CountFields):
    """The body of `/v1/messages`; `shoal` is this server's extension."""

    max_tokens: int = Field(ge=1)
    metadata: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    stop_sequences: list[str] | None = Field(None, max_length=MAX_STOPS, fail_fast=True)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    thinking: dict[str, Any] | None = None
    top_k: int | None = None
    top_p: float | None = None
    shoal: Annotated[Extension | None, few(32)] = None

    def chat(self) -> dict[str, Any]:
        """Return the body of a chat completion that asks the same; raises `ApiError`, 400."""
        body = super().chat()
        body["max_tokens"] = self.max_tokens
        asked = {
            "stop": self.stop_sequences or None,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "response_format": _response_format(
                self.output_format or (self.output_config or {}).get("format")
            ),
            "reasoning_effort": (self.output_config or {}).get("effort"),
            "chat_template_kwargs": self._thinking(),
            "shoal": self.shoal and self.shoal.model_dump(exclude_unset=True),
        }
        return body | {name: value for name, value in asked.items() if value is not None}

    def _thinking(self) -> dict[str, Any] | None:
        """Return what a chat template is told of thinking; most call it so."""
        kind = (self.thinking or {}).get("type")
        return None if kind is None else {"enable_thinking": kind != "disabled"}


def read_messages(body: bytes) -> Ask:
    """Return what a body of `/v1/messages` asks for; raises `ApiError`, 400.

    `max_tokens` is a ceiling there: an answer may be shorter where the model's context ends.
    """
    fields = read_fields(MessagesFields, read_json(body), _REFUSED)
    ask = _ask(fields)
    user = (fields.metadata or {}).get("user_id")
    # Other servers may refuse fields that no client sent.
    sent = {name: value for name, value in (ask.sent or {}).items() if name not in _FOR_TEMPLATES}
    return replace(ask, user=user if isinstance(user, str) else None, ceiling=True, sent=sent)


def read_count(body: bytes) -> Ask:
    """Return the conversation whose tokens are to be counted; raises `ApiError`, 400."""
    return _ask(read_fields(CountFields, read_json(body), _REFUSED))


def _ask(fields: CountFields) -> Ask:
    chat = fields.chat()
    try:
        return ChatEndpoint().read(chat)
    except ApiError as error:
        # Turns of the chat stand at other places than the messages that they were made of.
        raise error.renamed({"messages": "messages"}) from None


def _user(content: str | list[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """Yield the turns of a user's message: the results of calls are a tool's turns."""
    if isinstance(content, str):
        yield {"role": "user", "content": content}
        return
    parts: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        if block.get("type") == "tool_result":
            if parts:
                yield {"role": "user", "content": parts}
                parts = []
            inner = block.get("content") or ""
            told = [one for one in inner if _is_image(one)] if isinstance(inner, list) else []
            # A chat's results of calls are texts: their pictures follow them.
            pictures += [_part(image, where) for image in told]
            texts = [one for one in inner if not _is_image(one)] if told else inner
            content = _text(texts, f"{where}[{index}].content")
            if block.get("is_error") and not content.lower().startswith("error"):
                content = f"Error: {content}"  # a chat has no other way to say so
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
        else:
            parts.append(_part(block, f"{where}[{index}]"))
    if pictures or parts or not content:
        yield {"role": "user", "content": [*pictures, *parts] or ""}


def _assistant(content: str | list[dict[str, Any]], where: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        kind = block.get("type")
        if kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind != "redacted_thinking":  # which nobody but its maker can read
            texts.append(_text([block], f"{where}[{index}]"))
    turn: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) or None}
    if any(thoughts):
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    elif turn["content"] is None:
        turn["content"] = ""
    return turn


def _is_image(block: object) -> bool:
    return isinstance(block, dict) and block.get("type") == "image"


def _part(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a part of a chat message; whether a model takes pictures is not decided here."""
    source = block.get("source")
    if _is_image(block) and isinstance(source, dict):
        url = source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}"
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "text", "text": _text([dict(block)], where)}


def _text(content: object, where: str) -> str:
    """Return the text of blocks; raises `ApiError`, 400, for blocks of other types."""
    return "\n\n".join(texts_of(content, where, entry="block", kinds={"text": "text"}))


def _tool(tool: Tool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise bad_request(
            f"{where}.type: {tool.type!r} runs on Anthropic's servers and is not supported; "
            "only functions of your own are",
            f"{where}.type",
            "unsupported_parameter",
        )
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema or {"type": "object", "properties": {}},
        "strict": tool.strict,
    }
    told = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": told}


def _response_format(wanted: object) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if not isinstance(wanted, Mapping):
        raise bad_request("output_config.format: must be an object", "output_config.format")
    schema = {"name": "answer", "schema": wanted.get("schema"), "strict": True}
    return {"type": wanted.get("type"), "json_schema": schema}
