"""`/v1/messages`: answers, events and errors as Anthropic's clients read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, Field

from models.answer_format import ToolCall
from models.engines.base import Chunk
from policies.json_text import read_json_text
from router.anthropic_api.request import MessagesFields, read_messages
from router.errors import ApiError
from router.openai_api.endpoint import Ask, Head, ResponseWriter, Shapes, WireFormat
from router.openai_api.parts import Part, PartReader, parts_of
from router.openai_api.shapes import AnswerFacts

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
# What a chat's fields are called in a message.
_FIELDS = {
    "reasoning_effort": "output_config.effort",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ContentBlock(BaseModel):
    """A text, a thought or a call."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(BaseModel):
    """How many tokens; those of the prompt that no cache had are the `input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(BaseModel):
    """A message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    shoal: AnswerFacts | None = None


class MessageEvent(BaseModel):
    """An event of a streamed message; its `type` says which of the other fields it has."""

    type: str = Field(pattern=r"^(message|content_block)_")
    index: int | None = None
    message: MessageAnswer | None = None
    content_block: ContentBlock | None = None
    delta: dict[str, Any] | None = None
    usage: MessageUsage | None = None
    shoal: AnswerFacts | None = None


class MessageFailure(BaseModel):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class MessageError(BaseModel):
    """The body of an answer that is none, and the event of one that failed."""

    type: Literal["error"]
    error: MessageFailure


class MessagesEndpoint(WireFormat):
    """Reads and writes messages."""

    path = "/v1/messages"
    id_prefix = "msg_"
    shapes = Shapes(
        takes=MessagesFields,
        answers=MessageAnswer,
        streams=(MessageEvent, MessageError),
        errors=MessageError,
    )

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`."""
        return read_messages(body)

    async def writer(self, head: Head, ask: Ask) -> ResponseWriter:  # noqa: ARG002 - the contract
        """Return what writes the answer."""
        return MessageWriter(head=head)

    def error(self, error: ApiError) -> dict[str, Any]:
        """Return Anthropic's error body; clients shorten conversations whose prompt is too long."""
        usual = "invalid_request_error" if error.status < 500 else "api_error"
        kind = _ERRORS.get(error.status, usual)
        message = error.renamed(_FIELDS).body()["error"]["message"]
        if error.code == "context_length_exceeded":
            message = f"prompt is too long: {message}"
        return {"type": "error", "error": {"type": kind, "message": message}}


@dataclass(kw_only=True)
class MessageWriter(ResponseWriter):
    """Writes one message; `_open` is the part whose content block is open."""

    named_events = True

    head: Head
    _reader: PartReader = field(default_factory=PartReader)
    _open: tuple[str, int] | None = None
    _index: int = -1
    _ending: Mapping[str, Any] = field(default_factory=dict)

    def whole(self, choices: list[Chunk], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole message."""
        [answer] = choices
        return {
            **self._message(),
            "content": [_block(part) for part in parts_of(answer)],
            **_ending(answer),
            "usage": _usage(usage),
        }

    def start(self) -> list[dict[str, Any]]:
        """Return the start of the message, which tells the prompt's length."""
        usage = _usage(self.head.usage())
        return [{"type": "message_start", "message": {**self._message(), "usage": usage}}]

    def chunk(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:  # noqa: ARG002 - one choice
        """Return starts, pieces and ends of content blocks."""
        events: list[dict[str, Any]] = []
        for part in self._reader.read(chunk):
            if part.key != self._open:
                events += self._close()
                self._open, self._index = part.key, self._index + 1
                events.append(self._event("content_block_start", content_block=_empty(part)))
            delta = _delta(part)
            if delta:
                events.append(self._event("content_block_delta", delta=delta))
        if chunk.finish_reason is not None:
            events += self._close()
            self._ending = _ending(chunk)
        return events

    def end(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return why the message ended, and its usage."""
        return [
            {"type": "message_delta", "delta": self._ending, "usage": _usage(usage)},
            {"type": "message_stop"},
        ]

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """Return the error's event."""
        return [MessagesEndpoint().error(error)]

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.head.id,
            "type": "message",
            "role": "assistant",
            "model": self.head.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _close(self) -> list[dict[str, Any]]:
        events = [self._event("content_block_stop")] if self._open is not None else []
        self._open = None
        return events

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        return {"type": kind, "index": self._index, **more}


def _ending(answer: Chunk) -> dict[str, Any]:
    """Return the fields that tell why a message ended."""
    reason = "refusal" if answer.refusal else _STOP_REASONS[answer.finish_reason or "stop"]
    stopped_by = answer.stop if isinstance(answer.stop, str) and reason == "end_turn" else None
    return {
        "stop_reason": reason if stopped_by is None else "stop_sequence",
        "stop_sequence": stopped_by,
    }


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Return Anthropic's usage, where the prompt's tokens are those that no cache had."""
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _block(part: Part) -> dict[str, Any]:
    """Return a whole content block."""
    if part.call is not None:
        return {**_called(part.call), "input": _arguments(part.call)}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    return {"type": "text", "text": part.text}


def _empty(part: Part) -> dict[str, Any]:
    """Return the block that a stream begins with."""
    if part.call is not None:
        return {**_called(part.call), "input": {}}
    return _block(Part(kind=part.kind))


def _delta(part: Part) -> dict[str, Any] | None:
    if part.call is not None:
        told = part.call.arguments
        return {"type": "input_json_delta", "partial_json": told} if told else None
    if part.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": part.text}
    return {"type": "text_delta", "text": part.text}


def _called(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def _arguments(call: ToolCall) -> dict[str, Any]:
    """Return a call's arguments; none where the answer was cut off before they were whole."""
    try:
        found = read_json_text(call.arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
