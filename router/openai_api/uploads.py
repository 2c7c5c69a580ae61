"""How a form with a file is read: its kind, its size, and how long what it brings is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.types import Message

from router.bodies import Held
from router.errors import ApiError, bad_request

LEAST_KEPT_S = 3600  # OpenAI's
_FORM_BYTES = 2**16  # what a form takes beside its file
_CHARSETS = ("utf-8", "us-ascii", "iso-8859-1")


def check_form(kind: str) -> None:
    """Raise `ApiError`, 415, for anything but a form whose texts are plain.

    A form may name how its texts are written, and for some of Python's codecs ("punycode") a text
    takes time with the square of its length: nobody else would be served meanwhile.
    """
    name, options = parse_options_header(kind)
    charset = options.get(b"charset", b"utf-8").decode("latin-1").lower()
    if name != b"multipart/form-data":
        message = f"The content-type {kind[:80]!r} is not supported; send multipart/form-data."
    elif charset not in _CHARSETS:
        allowed = ", ".join(_CHARSETS)
        message = f"The charset {charset[:40]!r} is not supported; allowed are {allowed}."
    else:
        return
    raise ApiError(415, message, code="unsupported_media_type")


def bounded(
    request: Request, most: int, timeout_s: float, held: Held
) -> Callable[[], Awaitable[Message]]:
    """Return what receives the request's body, which is `held` from then on.

    It raises `ApiError`: 413 beyond `most` bytes, 408 where nothing comes for `timeout_s`.
    """
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        try:
            async with asyncio.timeout(timeout_s):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(
                408,
                f"Nothing more of the body came for {timeout_s:g} s (limits.body_timeout_s).",
                code="body_timeout",
            ) from None
        num_bytes += len(message.get("body", b""))
        held.add(len(message.get("body", b"")))
        if num_bytes > most + _FORM_BYTES:
            raise ApiError(
                413,
                f"A file has at most {most} bytes (batches.max_file_mb).",
                code="file_too_large",
            )
        return message

    return receive


def read_keep_s(form: FormData, most_s: float) -> float | None:
    """Return how long a form wants its file kept, None if it says nothing; raises `ApiError`."""
    anchor, seconds = (form.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise bad_request("expires_after.anchor: must be created_at", "expires_after")
    whole = isinstance(seconds, str) and seconds.isdecimal() and len(seconds) < 10
    if not whole or not LEAST_KEPT_S <= int(str(seconds)) <= most_s:
        raise bad_request(
            f"expires_after.seconds: must be from {LEAST_KEPT_S} to {most_s:.0f} "
            "(batches.keep_days)",
            "expires_after",
        )
    return float(str(seconds))
