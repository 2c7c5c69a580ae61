"""OpenAI's wire formats, from the client's side: what is asked, and what the events mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from models.engines.base import Chunk, FinishReason, GenerationRequest, Token, TopLogprob
from models.engines.remote.failure import AttemptFailed, broke_off, from_event
from models.engines.remote.options import RemoteOptions
from models.errors import EngineFailed
from models.tools import ToolCall

_JSON_OBJECT = '{"type":"object"}'
_FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
}
# A token without text: the end of sequence, hidden reasoning, a piece of a tool call.
_HIDDEN = Token(token_id=0, text="", raw=b"", logprob=None)


def write_body(
    request: GenerationRequest, model: str, options: RemoteOptions
) -> tuple[str, dict[str, Any]]:
    """Return the path and the JSON body that ask the server's `model` for `request`.

    A conversation goes to the chat endpoint. A text, or token ids (which must be that model's own),
    go to the completions endpoint.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        options.max_tokens_field: sampling.max_tokens,
    }
    asked = {
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "logit_bias": {str(i): bias for i, bias in sampling.logit_bias.items()} or None,
        "seed": sampling.seed,
        "stop": list(sampling.stop) or None,
        "ignore_eos": sampling.ignore_eos or None,
        "response_format": _response_format(sampling.json_schema),
    }
    body |= {name: value for name, value in asked.items() if value is not None}
    if request.messages is not None:
        body["messages"] = [dict(message) for message in request.messages]
        if request.tools is not None:
            body["tools"] = [dict(tool) for tool in request.tools.functions]
            body["tool_choice"] = request.tools.choice
        if options.logprobs:
            body["logprobs"] = True
            if sampling.top_logprobs:
                body["top_logprobs"] = sampling.top_logprobs
        return "/chat/completions", body
    body["prompt"] = list(request.prompt_tokens) if request.text is None else request.text
    if options.logprobs:
        body["logprobs"] = min(sampling.top_logprobs or 0, options.completion_logprobs)
    # This endpoint has never known another name for it.
    body["max_tokens"] = body.pop(options.max_tokens_field)
    return "/completions", body


class AnswerReader:
    """Turns the events of one answer into chunks.

    Counts tokens as the log-probabilities list them, else one per event; the server's usage, where
    it comes, adds those that were never shown.
    """

    def __init__(self, *, server: str, logprobs: bool) -> None:
        self._server = server
        self._logprobs = logprobs
        self._num_tokens = 0
        self._finish_reason: FinishReason | None = None
        self._usage: Mapping[str, Any] = {}
        self._calls: dict[int, dict[str, str]] = {}

    def read(self, data: str) -> Chunk | None:
        """Return what an event adds to the answer, if anything; raises `AttemptFailed`."""
        try:
            event = json.loads(data)
            if "error" in event:
                raise from_event(self._server, event["error"])
            self._usage = event.get("usage") or self._usage
            return self._chunk(event["choices"][0]) if event["choices"] else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise broke_off(
                self._server, f"an event cannot be read: {type(error).__name__} in {data[:200]!r}"
            ) from None

    def last(self) -> Chunk:
        """Return the last chunk, when the stream has ended; raises `AttemptFailed`."""
        if self._finish_reason is None:
            raise broke_off(self._server, "the answer broke off")
        num_hidden = int(self._usage.get("completion_tokens") or 0) - self._num_tokens
        prompt_tokens = self._usage.get("prompt_tokens")
        return Chunk(
            text="",
            tokens=(_HIDDEN,) * max(0, num_hidden),
            finish_reason="tool_calls" if self._calls else self._finish_reason,
            tool_calls=tuple(ToolCall(**self._calls[index]) for index in sorted(self._calls)),
            prompt_tokens=None if prompt_tokens is None else int(prompt_tokens),
        )

    def _chunk(self, choice: Mapping[str, Any]) -> Chunk | None:
        reason = choice.get("finish_reason")
        if reason is not None:
            if reason not in _FINISH_REASONS:
                raise broke_off(self._server, f"the finish reason {reason!r} is not supported")
            self._finish_reason = _FINISH_REASONS[reason]
        delta = choice.get("delta")
        text = (choice.get("text") if delta is None else delta.get("content")) or ""
        tokens = self._tokens(choice.get("logprobs"), text)
        if delta and delta.get("tool_calls"):
            self._add_calls(delta["tool_calls"])
        hidden = ("reasoning_content", "reasoning", "tool_calls")
        if not tokens and delta and any(delta.get(name) for name in hidden):
            tokens = (_HIDDEN,)
        self._num_tokens += len(tokens)
        return Chunk(text=text, tokens=tokens) if text or tokens else None

    def _add_calls(self, deltas: Sequence[Mapping[str, Any]]) -> None:
        """Add pieces of calls: the first piece has id and name, all have some of the arguments."""
        for delta in deltas:
            index = int(delta.get("index", len(self._calls)))
            call = self._calls.setdefault(index, {"id": "", "name": "", "arguments": ""})
            function = delta.get("function") or {}
            call["id"] = delta.get("id") or call["id"]
            call["name"] += function.get("name") or ""
            call["arguments"] += function.get("arguments") or ""

    def _tokens(self, logprobs: Mapping[str, Any] | None, text: str) -> tuple[Token, ...]:
        if not self._logprobs:
            return (_unknown(text),) if text else ()
        if logprobs is None:
            if text:
                # A property of the server, not a failure that another attempt would mend.
                error = EngineFailed(
                    f"{self._server} returns no log-probabilities; set logprobs: false in the "
                    "engine's options"
                )
                raise AttemptFailed(error, retry=False, broken=False)
            return ()
        if "content" in logprobs:
            return tuple(_chat_token(item) for item in logprobs["content"] or ())
        tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
        return tuple(
            _text_token(token, logprob, top or {})
            for token, logprob, top in zip(
                logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True
            )
        )


def _response_format(json_schema: str | None) -> dict[str, Any] | None:
    if json_schema is None:
        return None
    if json_schema == _JSON_OBJECT:
        return {"type": "json_object"}
    wanted = {"name": "answer", "schema": json.loads(json_schema), "strict": True}
    return {"type": "json_schema", "json_schema": wanted}


def _unknown(text: str) -> Token:
    return Token(token_id=0, text=text, raw=text.encode(), logprob=None)


def _chat_token(item: Mapping[str, Any]) -> Token:
    top = tuple(
        TopLogprob(token_id=0, text=i["token"], raw=_raw(i), logprob=float(i["logprob"]))
        for i in item.get("top_logprobs") or ()
    )
    return Token(
        token_id=0, text=item["token"], raw=_raw(item), logprob=float(item["logprob"]), top=top
    )


def _raw(item: Mapping[str, Any]) -> bytes:
    listed = item.get("bytes")
    return str(item["token"]).encode() if listed is None else bytes(listed)


def _text_token(text: str, logprob: float | None, top: Mapping[str, float]) -> Token:
    ranked = sorted(top.items(), key=lambda entry: -entry[1])
    return Token(
        token_id=0,
        text=text,
        raw=text.encode(),
        logprob=logprob,
        top=tuple(
            TopLogprob(token_id=0, text=other, raw=other.encode(), logprob=value)
            for other, value in ranked
        ),
    )
