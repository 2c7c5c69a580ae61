"""What went wrong with one attempt, and what to make of it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import httpx

from models.errors import (
    ContextOverflow,
    EngineError,
    EngineFailed,
    EngineOverloaded,
    RequestError,
)

_MAX_CHARACTERS = 300
_RETRIED = (408, 409, 429)


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
    message, param, code = _read(body)
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


def _read(body: bytes) -> tuple[str, str | None, str | None]:
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
