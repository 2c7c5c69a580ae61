"""How another server is asked and what it answers: options, bodies, events, failures.

OpenAI's wire formats from the client's side; `engine` sends and receives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.engines.base import Chunk, FinishReason, GenerationRequest, Token, TopLogprob
from models.errors import (
    ContextOverflow,
    EngineError,
    EngineFailed,
    EngineOverloaded,
    PoolError,
    RequestError,
)
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
_MAX_CHARACTERS = 300
_RETRIED = (408, 409, 429)


class RemoteOptions(BaseModel):
    """Where the server is, how to ask it, and how long to be patient.

    `base_url` ends where `/chat/completions` follows, usually in `/v1`. The key is read at start
    from the environment variable `api_key_env` or the file `api_key_file` (a mounted secret), never
    from this file. `logprobs` false for a server that returns no log-probabilities: its answers
    cannot be judged by a cascade's scorer then. Its completions endpoint tells of at most
    `completion_logprobs` alternatives (vLLM's of 20). Newer hosted models want `max_tokens_field`
    "max_completion_tokens".

    A connection must stand within `connect_timeout_s`, and the server may be silent for at most
    `read_timeout_s`; at most `max_connections` requests run at once. An attempt that failed before
    any text came is repeated up to `max_retries` times, after the time that the server asks for,
    else after `backoff_s`, doubled each time; only if the request's deadline allows. After
    `breaker_failures` failures in a row the server is left alone for `breaker_open_s`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field(pattern=r"^https?://[^\s?#]+$")
    api_key_env: str | None = None
    api_key_file: Path | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    logprobs: bool = True
    completion_logprobs: int = Field(5, ge=0, le=20)
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    connect_timeout_s: float = Field(5, gt=0)
    read_timeout_s: float = Field(60, gt=0)
    max_connections: int = Field(100, ge=1)
    max_retries: int = Field(2, ge=0)
    backoff_s: float = Field(0.5, gt=0)
    breaker_failures: int = Field(5, ge=1)
    breaker_open_s: float = Field(30, gt=0)

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("give api_key_env or api_key_file, not both")
        for name in self.headers:
            if name.lower() == "authorization":
                raise ValueError("a key belongs into api_key_env or api_key_file, not into headers")
        return self

    def read_key(self, engine: str) -> str | None:
        """Return the key; None where none is configured. `PoolError` if it isn't there."""
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise PoolError(
                    f"engines.{engine}.options.api_key_env: the environment variable "
                    f"{self.api_key_env} is not set where the engine runs"
                )
            return key
        if self.api_key_file is not None:
            try:
                key = self.api_key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise PoolError(
                    f"engines.{engine}.options.api_key_file: {self.api_key_file} cannot be read: "
                    f"{type(error).__name__}"
                ) from None
            if not key:
                raise PoolError(
                    f"engines.{engine}.options.api_key_file: {self.api_key_file} is empty"
                )
            return key
        return None


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


class AttemptFailed(Exception):
    """One attempt failed; `error` is what the caller is told if no other one follows.

    `retry` says whether another attempt may help, `retry_after_s` when the server wants it.
    `broken` says whether the server failed, which the circuit breaker counts; else it answered.
    """

    def __init__(
        self,
        error: EngineError | RequestError,
        *,
        retry: bool,
        broken: bool,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry = retry
        self.broken = broken
        self.retry_after_s = retry_after_s


def from_transport(server: str, error: httpx.HTTPError) -> AttemptFailed:
    """Return what a failed connection, a timeout or a broken stream means."""
    kind = type(error).__name__
    return AttemptFailed(EngineFailed(f"{server}: {kind}"), retry=True, broken=True)


def broke_off(server: str, why: str) -> AttemptFailed:
    """Return what an answer means that is not whole, or none at all."""
    return AttemptFailed(EngineFailed(f"{server}: {why}"), retry=True, broken=True)


def from_response(
    server: str, status: int, headers: Mapping[str, str], body: bytes
) -> AttemptFailed:
    """Return what a response that is no answer means: its status, and OpenAI's error body."""
    message, param, code = _read_error(body)
    told = f"{server} answered {status}: {message}"
    wait_s = read_retry_after_s(headers)
    if status in (401, 403):
        # Such messages may repeat parts of the key.
        error: EngineError | RequestError = EngineFailed(f"{server} refuses the key ({status})")
        return AttemptFailed(error, retry=False, broken=False)
    if status in (400, 413, 422):
        if code == "context_length_exceeded" or status == 413:
            error = ContextOverflow(told, param)
        else:
            error = RequestError(told, param)
        return AttemptFailed(error, retry=False, broken=False)
    if status == 429:
        error = EngineOverloaded(told, 1.0 if wait_s is None else wait_s)
    else:
        error = EngineFailed(told)
    retry = status in _RETRIED or status >= 500
    if "x-should-retry" in headers:
        retry = headers["x-should-retry"] == "true"
    return AttemptFailed(error, retry=retry, broken=status >= 500, retry_after_s=wait_s)


def from_event(server: str, error: object) -> AttemptFailed:
    """Return what an error in the middle of an event stream means."""
    message = error.get("message") if isinstance(error, dict) else error
    return broke_off(server, f"the answer ended in an error: {_short(str(message))}")


def read_retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return when the server wants to be asked again; None where it doesn't say in seconds."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait_s = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if 0 <= wait_s < float("inf"):
            return wait_s
    return None


def _read_error(body: bytes) -> tuple[str, str | None, str | None]:
    """Return message, param and code of an error body; as much of it as text if it is no JSON."""
    try:
        data = json.loads(body)
    except ValueError:
        return _short(body.decode(errors="replace")) or "no explanation", None, None
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return _short(str(error)), None, None
    param, code = error.get("param"), error.get("code")
    return (
        _short(str(error.get("message", error))),
        param if isinstance(param, str) else None,
        code if isinstance(code, str) else None,
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + " ..."
