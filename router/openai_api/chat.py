"""`/v1/chat/completions`: the body it takes, the objects it answers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from models.chat_template import Message, Rendering
from models.engines.base import Chunk
from policies.kinds import Count
from router.errors import bad_request
from router.executor.task import Media, Prompt
from router.openai_api.constraints import MAX_TOOLS, read_tools
from router.openai_api.endpoint import Ask, ChunkWriter, Head, ResponseWriter, Shapes, WireFormat
from router.openai_api.fields import ReasoningEffort, SharedFields, read_fields, read_json
from router.openai_api.logprobs import chat_logprobs
from router.openai_api.shapes import ChatCompletion, ChatCompletionChunk
from router.openapi import ErrorBody

MAX_MESSAGES = 2048  # OpenAI's; each takes everybody's time while it is checked
_MAX_PARTS = 1024
_MAX_ARGUMENTS = 64

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

REFUSED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "audio": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Parts that only members on other servers may be able to read; those get them as they came.
MEDIA = ("image_url", "input_audio", "file", "audio_url", "video_url")
# What a template gets from elsewhere.
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})


def _read_role(value: object) -> str:
    if not isinstance(value, str) or value not in _ROLES:
        raise ValueError(f"{value!r} is not supported; allowed are {', '.join(_ROLES)}")
    return _ROLES[value]


def _read_arguments(value: object) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError("must be an object of the template's variables")
    if len(value or {}) > _MAX_ARGUMENTS:
        raise ValueError(f"at most {_MAX_ARGUMENTS} variables are allowed")
    for name in value or {}:
        if name in _RESERVED or not str(name).isidentifier():
            raise ValueError(f"{name!r} is no variable that a client may set")
    return value or {}


def _read_content(value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    if len(value) > _MAX_PARTS:
        raise ValueError(f"at most {_MAX_PARTS} parts are allowed")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in MEDIA:
            continue
        if kind not in ("text", "refusal"):
            allowed = ", ".join(("text", "refusal", *MEDIA))
            raise ValueError(f"a part of type {kind!r} is not supported; allowed are {allowed}")
        if not isinstance(part.get(kind), str):
            raise ValueError(f"a {kind} part needs the key {kind}, a string")
        texts.append(part[kind])
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

    def to_json(self) -> dict[str, Any]:
        """Return the call as it came, in a tenth of the time that pydantic takes for it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Annotated[str, BeforeValidator(_read_role)]
    content: Annotated[str, BeforeValidator(_read_content)] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_call_id: str | None = None
    # Refused by name.
    audio: SkipJsonSchema[Any] = None
    function_call: SkipJsonSchema[Any] = None

    def problem(self) -> tuple[str, str] | None:
        """Return which field is wrong for this role, and why; None if the message is in order."""
        if self.tool_calls and self.role != "assistant":
            return "tool_calls", "only an assistant's message has them"
        if self.role == "tool" and self.tool_call_id is None:
            return "tool_call_id", "a tool's message names the call that it answers"
        if self.role != "assistant" and self.content is None:
            return "content", "it is missing"
        told = (self.content, self.tool_calls, self.refusal, self.reasoning_content, self.reasoning)
        if all(part is None for part in told):
            return "content", "it is missing"
        return None

    def turn(self) -> Message:
        """Return the message as prompts are made of it; a refusal is what an assistant said."""
        content = self.refusal if self.content is None else self.content
        turn: dict[str, Any] = {"role": self.role, "content": content or ""}
        if self.name:
            turn["name"] = self.name
        reasoning = self.reasoning_content or self.reasoning
        if reasoning:
            turn["reasoning_content"] = reasoning
        if self.tool_calls:
            turn["tool_calls"] = [call.to_json() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


class ChatFields(SharedFields):
    """The body of a chat completion."""

    messages: list[_Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    logprobs: bool | None = None
    max_completion_tokens: Count | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    top_logprobs: int | None = Field(None, ge=0, le=20)

    add_generation_prompt: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_read_arguments)] = Field(
        default_factory=dict
    )
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None

    def rendering(self) -> Rendering:
        """Return how the conversation becomes a prompt; raises `ApiError`, 400."""
        continues = bool(self.continue_final_message)
        if continues and self.add_generation_prompt:
            raise bad_request(
                "continue_final_message: add_generation_prompt must then be false",
                "continue_final_message",
            )
        arguments = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            arguments.setdefault("reasoning_effort", self.reasoning_effort)
            if self.reasoning_effort == "none":
                arguments.setdefault("enable_thinking", False)
        return Rendering(
            generation_prompt=self.add_generation_prompt is not False and not continues,
            continue_final=continues,
            arguments=arguments,
        )


class ChatEndpoint(WireFormat):
    """Reads and writes chat completions."""

    path = "/v1/chat/completions"
    id_prefix = "chatcmpl-"
    shapes = Shapes(
        takes=ChatFields, answers=ChatCompletion, streams=(ChatCompletionChunk, ErrorBody)
    )

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`."""
        return self.read(read_json(body))

    def read(self, sent: Mapping[str, Any]) -> Ask:
        """Return what the object `sent` asks for; raises `ApiError`."""
        fields = read_fields(ChatFields, sent, REFUSED)
        if fields.top_logprobs and not fields.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        for index, message in enumerate(fields.messages):
            for name in ("function_call", "audio"):
                if getattr(message, name):
                    param = f"messages[{index}].{name}"
                    raise bad_request(
                        f"{param} is not supported by this server", param, "unsupported_parameter"
                    )
            problem = message.problem()
            if problem is not None:
                param = f"messages[{index}].{problem[0]}"
                raise bad_request(f"{param}: {problem[1]}", param)
        messages = [message.turn() for message in fields.messages]
        tools = read_tools(
            fields.tools, fields.tool_choice, parallel=fields.parallel_tool_calls is not False
        )
        max_tokens = fields.max_completion_tokens or fields.max_tokens
        fields.check_min_tokens(max_tokens)
        prompt = Prompt(
            messages=messages,
            tools=tools,
            rendering=fields.rendering(),
            media=_media(sent["messages"]),
            keep_tokens=fields.truncate_prompt_tokens,
        )
        return Ask(
            model=fields.model,
            prompts=(prompt,),
            n=fields.n or 1,
            max_tokens=max_tokens,
            sampling=fields.sampling(
                top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None
            ),
            stream=bool(fields.stream),
            include_usage=fields.include_usage(),
            continuous_usage=fields.continuous_usage(),
            logprobs=bool(fields.logprobs),
            reasoning=fields.include_reasoning is not False,
            user=fields.user or fields.safety_identifier,
            sent=sent,
            extension=fields.extension(),
        )

    async def writer(self, head: Head, ask: Ask) -> ResponseWriter:
        """Return what writes the completion."""
        return ChatWriter(head=head, ask=ask)


class ChatWriter(ChunkWriter):
    """Writes a chat completion."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, index: int, choice: Chunk) -> dict[str, Any]:  # noqa: ARG002 - all are alike
        """Return a message, and its tokens where they were asked for."""
        return {
            "message": _message(choice, reasoning=self.ask.reasoning),
            "logprobs": chat_logprobs(choice.tokens) if self.ask.logprobs else None,
        }

    def start(self) -> list[dict[str, Any]]:
        """Return each choice's role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._delta(index, delta) for index in range(self.ask.num_choices)]

    def chunk(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Return what `chunk` becomes: thoughts, text, calls, why it ended."""
        pieces = []
        if chunk.reasoning and self.ask.reasoning:
            pieces.append(self._delta(index, _reasoning(chunk)))
        if chunk.text or (self.ask.logprobs and chunk.tokens):
            logprobs = chat_logprobs(chunk.tokens) if self.ask.logprobs else None
            pieces.append(self._delta(index, {"content": chunk.text}, logprobs))
        if chunk.refusal:
            pieces.append(self._delta(index, {"refusal": chunk.refusal}))
        if chunk.tool_calls:
            calls = [call.to_delta() for call in chunk.tool_calls]
            pieces.append(self._delta(index, {"tool_calls": calls}))
        if chunk.finish_reason is not None:
            pieces.append(self._delta(index, {}, end=chunk))
        return pieces

    def _delta(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: dict[str, Any] | None = None,
        end: Chunk | None = None,
    ) -> dict[str, Any]:
        return self.piece(index, {"delta": delta}, logprobs, end)


def _media(messages: Sequence[Mapping[str, Any]]) -> Media | None:
    """Return the first part that is no text; None where all are."""
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part["type"] in MEDIA:
                return Media(f"messages[{index}].content", part["type"])
    return None


def _message(choice: Chunk, *, reasoning: bool) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text,
        "refusal": choice.refusal or None,
        **(_reasoning(choice) if choice.reasoning and reasoning else {}),
    }
    if choice.tool_calls or choice.refusal:
        message["content"] = choice.text or None
    if choice.tool_calls:
        message["tool_calls"] = [call.to_json() for call in choice.tool_calls]
    return message


def _reasoning(chunk: Chunk) -> dict[str, str]:
    """Return what the model thought, by both names under which clients look for it."""
    return {"reasoning": chunk.reasoning, "reasoning_content": chunk.reasoning}
