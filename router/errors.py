"""What a client is told when something goes wrong, and the one place that decides it.

Exception
└── ApiError           carries HTTP status and the four keys of OpenAI's error body
    ├── bad_request()  400 and its kin, the client's fault
    └── ...

Everything else that is raised below the API is mapped by `to_api_error`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from models.errors import ContextOverflow, EngineError, EngineOverloaded, RequestError
from policies.errors import PolicyError
from router.access.authentication import KeyRejected
from router.access.keys import KeysError, NameTaken, NotFound
from router.access.limits import BudgetExhausted, BudgetUnavailable, CapError
from router.ledger.calls import is_away

_MOST_CHARACTERS = 1000


class ApiError(Exception):
    """An error as OpenAI's clients expect it: `{"error": {message, type, param, code}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """Return the error for a dialect where fields that are `names`' keys have other names.

        A turn's place is left out, as a conversation may have others there.
        """
        param = self.param or ""
        old = next((name for name in names if re.match(rf"{re.escape(name)}(\W|$)", param)), None)
        if old is None:
            return self
        rest = param[len(old) :]
        new = names[old] + ("" if rest.startswith("[") else rest)
        message = self.message
        if message.startswith(param):
            message = new + message[len(param) :]
        return ApiError(
            self.status, message, kind=self.kind, param=new, code=self.code, headers=self.headers
        )

    def body(self) -> dict[str, Any]:
        """Return the response's JSON body; what the client sent is not echoed at any length."""
        return {
            "error": {
                "message": _short(self.message, _MOST_CHARACTERS),
                "type": self.kind,
                "param": self.param and _short(self.param, _MOST_CHARACTERS // 8),
                "code": self.code,
            }
        }


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code or "invalid_value")


def retry_headers(retry_after_s: float) -> dict[str, str]:
    """Return the headers from which OpenAI's clients read when to come back."""
    return {
        "retry-after": str(max(1, math.ceil(retry_after_s))),
        "retry-after-ms": str(max(1, math.ceil(retry_after_s * 1000))),
    }


def to_api_error(error: BaseException) -> ApiError:  # noqa: PLR0911 - one per kind of error
    """Return what the client is told of `error`; unknown errors tell nothing of our insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | PolicyError | KeysError | CapError):
        return _refused(error)
    if isinstance(error, KeyRejected):
        kind = "authentication_error" if error.status == 401 else "permission_error"
        code = "invalid_api_key" if error.status == 401 else "insufficient_permissions"
        headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
        return ApiError(error.status, str(error), kind=kind, code=code, headers=headers)
    if isinstance(error, BudgetExhausted):
        return _budget_exhausted(error)
    if isinstance(error, BudgetUnavailable):
        return unavailable(str(error), "budgets_unavailable")
    if isinstance(error, SQLAlchemyError) and is_away(error):
        retry_after_s = getattr(error, "retry_after_s", 1.0)
        message = "The server's database does not answer now; try again shortly."
        return unavailable(message, "database_unavailable", retry_after_s)
    if isinstance(error, EngineOverloaded):
        return ApiError(
            429,
            f"The server is overloaded: {error}",
            kind="rate_limit_error",
            code="overloaded",
            headers=retry_headers(error.retry_after_s),
        )
    if isinstance(error, EngineError):
        return unavailable(f"No engine could answer: {error}", "engine_failed")
    if isinstance(error, TimeoutError):
        return ApiError(
            504,
            "The answer took longer than the request's timeout.",
            kind="timeout_error",
            code="deadline_exceeded",
            headers={"x-should-retry": "false"},
        )
    return ApiError(500, "Internal server error.", kind="server_error", code="internal_error")


def _refused(error: RequestError | PolicyError | KeysError | CapError) -> ApiError:
    """Return what the client is told of something that it asked for and cannot have."""
    if isinstance(error, ContextOverflow):
        return bad_request(str(error), error.param, "context_length_exceeded")
    if isinstance(error, RequestError):
        return bad_request(str(error), error.param)
    if isinstance(error, PolicyError | CapError):
        return bad_request(str(error), "caps" if isinstance(error, CapError) else "shoal.plan")
    if isinstance(error, NotFound):
        return ApiError(404, str(error), param=error.field, code=f"{error.field}_not_found")
    if isinstance(error, NameTaken):
        return ApiError(409, str(error), param=error.field, code="name_taken")
    return bad_request(str(error), error.field)


def unavailable(message: str, code: str, retry_after_s: float = 1.0) -> ApiError:
    """Return what a client is told to ask again, after `retry_after_s`."""
    headers = retry_headers(retry_after_s)
    return ApiError(503, message, kind="server_error", code=code, headers=headers)


def _budget_exhausted(error: BudgetExhausted) -> ApiError:
    if error.final:
        # Clients obey x-should-retry; retry-after tells people (and schedulers) when to come back.
        wait_s = max(0.0, error.reset_s - time.time())
        told = {"x-should-retry": "false", "retry-after": str(math.ceil(wait_s))}
        kind = code = "insufficient_quota"
    else:
        told = {"x-should-retry": "true", **retry_headers(1.0)}
        kind, code = "rate_limit_error", "budget_in_use"
    return ApiError(429, str(error), kind=kind, code=code, headers=error.headers | told)
