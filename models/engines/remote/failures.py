"""What it means when a server does not answer: its statuses, error bodies and broken streams."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import httpx

from models.errors import (
    ContextOverflow,
    EngineError,
    EngineFailed,
    EngineOverloaded,
    RequestError,
    quoted,
)
from policies.json_text import read_json_text, whole_text

_MAX_CHARACTERS = 300
_STATUSES = range(400, 600)
_RETRIED = (408, 409, 429)
_LONGEST_WAIT_S = 86_400.0
_OVERFLOW_CODES = ("context_length_exceeded", "exceed_context_size_error", "request_too_large")
# A prompt too long for its model, as OpenAI, vLLM, SGLang, llama.cpp, Ollama, TGI, Mistral, Google,
# Anthropic, Bedrock, Moonshot, Zhipu, Qwen and MiniMax say it. A refused `max_tokens` alone is none
# of these.
_OVERFLOW = re.compile(
    r"(maximum|max|available|model'?s?|configured) (context|model|sequence|input) "
    r"?(length|size|limit|window)"
    r"|context (length|size|window|limit)( of \S+)?( is| has been|:)? ?(only|exceeded|\d)"
    r"|exceed\w*( the| your)?( model'?s?)?( maximum| max| available)? context"
    r"|(longer|greater|larger|more) than (the )?(model'?s?|maximum|max)?'? ?(context|model) ?"
    r"(length|size|window)"
    r"|than the context (length|size|window)"
    r"|`?inputs`? (tokens \+ `?max_new_tokens|must have less than)"
    r"|input tokens? (count )?(\(\d+\) )?exceeds?\b"
    r"|(prompt|input|conversation) (is )?too (long|large)"
    r"|reduce the length of the (messages|prompt|input)"
    r"|(request|prompt|input|text)s?\b.{0,40}exceed\w* (model|max(imum)?)( message)? (token|length)"
    r"|range of input length|tokens in request more than max|context_length_exceeded",
    re.IGNORECASE,
)


class AttemptFailed(Exception):
    """One attempt failed; `error` is what the caller is told if no other one follows.

    `retry` says whether another attempt may help, `retry_after_s` when the server wants it.
    `broken` says whether the server failed, which the circuit breakers count; else it answered.
    Where it is `unreachable` that is no request's fault.
    """

    def __init__(
        self,
        error: EngineError | RequestError,
        *,
        retry: bool,
        broken: bool,
        retry_after_s: float | None = None,
        unreachable: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry = retry
        self.broken = broken
        self.retry_after_s = retry_after_s
        self.unreachable = unreachable


def from_transport(server: str, error: httpx.HTTPError) -> AttemptFailed:
    """Return what a failed connection, a timeout or a broken stream means."""
    kind = type(error).__name__
    unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    failed = EngineFailed(f"{server}: {kind}")
    return AttemptFailed(failed, retry=True, broken=True, unreachable=unreachable)


def broke_off(server: str, why: str) -> AttemptFailed:
    """Return what an answer means that is not whole, or none at all."""
    return AttemptFailed(EngineFailed(f"{server}: {why}"), retry=True, broken=True)


def unreadable(server: str, told: object, error: Exception) -> AttemptFailed:
    """Return what it means that what a server `told` is not as agreed."""
    why = f"{error!r} in {_short(str(told)[:_MAX_CHARACTERS])}"
    return broke_off(server, f"an answer cannot be read: {quoted(why)}")


def from_response(
    server: str, status: int, headers: Mapping[str, str], body: bytes
) -> AttemptFailed:
    """Return what a response that is no answer means: its status, and OpenAI's error body."""
    message, param, code = _read_error(body)
    if status in (401, 403):
        # Such messages may repeat parts of the key.
        refused = EngineFailed(f"{server} refuses the key ({status})")
        return AttemptFailed(refused, retry=False, broken=False)
    if status == 413 or _overflows(status, message, code):
        return _overflow(server, message, param)
    told = f"{server} answered {status}: {quoted(message)}"
    wait_s = read_retry_after_s(headers)
    if status in (400, 422):
        return AttemptFailed(RequestError(told, param), retry=False, broken=False)
    if status == 429:
        error: EngineError = EngineOverloaded(told, 1.0 if wait_s is None else wait_s)
    else:
        error = EngineFailed(told)
    retry = status in _RETRIED or status >= 500
    if "x-should-retry" in headers:
        retry = headers["x-should-retry"] == "true"
    return AttemptFailed(error, retry=retry, broken=status >= 500, retry_after_s=wait_s)


def from_event(server: str, error: object) -> AttemptFailed:
    """Return what an error in the middle of an event stream means: as a status where it has one."""
    body = json.dumps(error).encode()
    status = next(
        (
            error[key]
            for key in ("code", "status", "status_code")
            if isinstance(error, dict) and error.get(key) in _STATUSES
        ),
        None,
    )
    if status is not None:
        return from_response(server, status, {}, body)
    message, param, code = _read_error(body)
    if _overflows(400, message, code):
        return _overflow(server, message, param)
    return broke_off(server, f"the answer ended in an error: {quoted(message)}")


def _overflows(status: int, message: str, code: str | None) -> bool:
    """Return whether an error says that the prompt is too long; 429s speak of rates."""
    known = status in (400, 422) or status >= 500
    return known and (code in _OVERFLOW_CODES or _OVERFLOW.search(message) is not None)


def _overflow(server: str, message: str, param: str | None) -> AttemptFailed:
    error = ContextOverflow(
        f"{server}: the maximum context length is exceeded: {quoted(message)}", param
    )
    return AttemptFailed(error, retry=False, broken=False)


def read_retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return when the server wants to be asked again; None where it doesn't say in seconds."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait_s = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if wait_s >= 0:
            return min(wait_s, _LONGEST_WAIT_S)
    return None


def _read_error(body: bytes) -> tuple[str, str | None, str | None]:
    """Return message, param and code (or type) of an error body; its text if it is no JSON."""
    try:
        data = read_json_text(body)
    except ValueError:
        return _short(body.decode(errors="replace")) or "no explanation", None, None
    error = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(error, dict):
        return _short(str(error)), None, None
    param, code, kind = error.get("param"), error.get("code"), error.get("type")
    told = code if isinstance(code, str) else kind
    told_as = ("message", "detail", "msg")
    message = next((error[key] for key in told_as if isinstance(error.get(key), str)), error)
    return (
        _short(str(message)),
        _short(param) if isinstance(param, str) else None,
        told if isinstance(told, str) else None,
    )


def _short(text: str) -> str:
    text = whole_text(" ".join(text.split()))
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + " ..."
