"""`/v1/chat/completions`: the body it takes, the objects it answers with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import from_json

from models.chat_template import Message
from models.engines.base import Chunk
from policies.kinds import Count
from router.errors import bad_request
from router.executor.task import Prompt
from router.openai_api.ask import Ask, Extension
from router.openai_api.endpoint import ByChunks, Head
from router.openai_api.fields import SharedFields, read_body, read_schema
from router.openai_api.logprobs import chat_logprobs
from router.openai_api.tools import read_tools

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def _read_role(value: object) -> str:
    if not isinstance(value, str) or value not in _ROLES:
        raise ValueError(f"{value!r} is not supported; allowed are {', '.join(_ROLES)}")
    return _ROLES[value]


def _read_content(value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"a part of type {kind!r} is not supported; only text is")
        if not isinstance(part.get("text"), str):
            raise ValueError("a text part needs the key text, a string")
        texts.append(part["text"])
    return "\n".join(texts)


class _CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    arguments: str


class _ToolCall(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, BeforeValidator(_read_role)]
    content: Annotated[str, BeforeValidator(_read_content)] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None

    def problem(self) -> tuple[str, str] | None:
        """Return which field is wrong for this role, and why; None if the message is in order."""
        if self.tool_calls and self.role != "assistant":
            return "tool_calls", "only an assistant's message has them"
        if self.role == "tool" and self.tool_call_id is None:
            return "tool_call_id", "a tool's message names the call that it answers"
        if self.content is None and not self.tool_calls:
            return "content", "it is missing"
        return None

    def turn(self) -> Message:
        """Return the message as prompts are made of it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


class ChatFields(SharedFields):
    """The body of a chat completion."""

    messages: list[_Message] = Field(min_length=1)
    logprobs: bool | None = None
    max_completion_tokens: Count | None = None
    response_format: dict[str, Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class ChatEndpoint(ByChunks):
    """Reads and writes chat completions."""

    path = "/v1/chat/completions"
    id_prefix = "chatcmpl-"
    schema: type[BaseModel] = ChatFields

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`."""
        fields = read_body(ChatFields, body, _UNSUPPORTED)
        if fields.top_logprobs is not None and not fields.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        for index, message in enumerate(fields.messages):
            problem = message.problem()
            if problem is not None:
                param = f"messages[{index}].{problem[0]}"
                raise bad_request(f"{param}: {problem[1]}", param)
            for name in ("function_call", "audio"):
                if (message.model_extra or {}).get(name):
                    param = f"messages[{index}].{name}"
                    raise bad_request(
                        f"{param} is not supported by this server", param, "unsupported_parameter"
                    )
        messages = [message.turn() for message in fields.messages]
        tools = read_tools(fields.tools, fields.tool_choice)
        return Ask(
            model=fields.model,
            prompts=(Prompt(messages=messages, tools=tools),),
            n=fields.n or 1,
            max_tokens=fields.max_completion_tokens or fields.max_tokens,
            sampling=fields.sampling(
                top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
                json_schema=read_schema(fields.response_format),
            ),
            stream=bool(fields.stream),
            include_usage=fields.include_usage(),
            logprobs=bool(fields.logprobs),
            user=fields.user,
            sent=from_json(body),
            extension=fields.shoal or Extension(),
        )

    def response(self, head: Head, ask: Ask, choices: list[Chunk]) -> dict[str, Any]:
        """Return the whole response but for usage."""
        return {
            **head.fields("chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": _message(choice),
                    "logprobs": chat_logprobs(choice.tokens) if ask.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
        }

    def stream_start(self, head: Head, ask: Ask) -> Iterator[dict[str, Any]]:
        """Yield what comes before the first token: each choice's role."""
        for index in range(ask.num_choices):
            delta = {"role": "assistant", "content": "", "refusal": None}
            yield self._chunk(head, index, delta, None, None)

    def stream_chunk(
        self,
        head: Head,
        ask: Ask,
        index: int,
        chunk: Chunk,
        offset: int,  # noqa: ARG002 - the contract
    ) -> Iterator[dict[str, Any]]:
        """Yield what `chunk` of choice `index` becomes: thoughts, text, then why it ended."""
        if chunk.reasoning:
            yield self._chunk(head, index, _reasoning(chunk), None, None)
        if chunk.text or (ask.logprobs and chunk.tokens):
            logprobs = chat_logprobs(chunk.tokens) if ask.logprobs else None
            yield self._chunk(head, index, {"content": chunk.text}, logprobs, None)
        if chunk.refusal:
            yield self._chunk(head, index, {"refusal": chunk.refusal}, None, None)
        if chunk.tool_calls:
            calls = [call.to_delta() for call in chunk.tool_calls]
            yield self._chunk(head, index, {"tool_calls": calls}, None, None)
        if chunk.finish_reason is not None:
            yield self._chunk(head, index, {}, None, chunk.finish_reason)

    def stream_end(self, head: Head) -> dict[str, Any]:
        """Return the chunk that carries the usage."""
        return {**head.fields("chat.completion.chunk"), "choices": []}

    def _chunk(
        self,
        head: Head,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {**head.fields("chat.completion.chunk"), "choices": [choice]}


def _message(choice: Chunk) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text,
        "refusal": choice.refusal or None,
        **(_reasoning(choice) if choice.reasoning else {}),
    }
    if choice.tool_calls or choice.refusal:
        message["content"] = choice.text or None
    if choice.tool_calls:
        message["tool_calls"] = [call.to_json() for call in choice.tool_calls]
    return message


def _reasoning(chunk: Chunk) -> dict[str, str]:
    """Return what the model thought, by both names under which clients look for it."""
    return {"reasoning": chunk.reasoning, "reasoning_content": chunk.reasoning}
