"""How a request's body is read: bounded, and unpacked."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable

import zstandard
from starlette.requests import ClientDisconnect, Request

from router.errors import ApiError
from router.streams import ClientDisconnected

# How much is unpacked at a time: a small body may claim to hold a very large one.
_STEP_BYTES = 2**16

Unpack = Callable[[bytes, int], tuple[bytes, bytes]]
"""From packed bytes and how many to unpack at most, to unpacked ones and packed ones left over."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the request's body, unpacked.

    Raises `ApiError`: 413 if it is longer than `max_bytes`, 415 for what is packed in an
    unknown way, 400 for what cannot be unpacked; and `ClientDisconnected`.
    """
    packing = request.headers.get("content-encoding", "identity").strip().lower()
    if packing not in ("identity", "gzip", "x-gzip", "deflate", "zstd"):
        raise ApiError(
            415,
            f"content-encoding: {packing[:40]!r} is unknown; allowed are gzip, deflate, zstd.",
            code="unsupported_encoding",
            headers={"accept-encoding": "gzip, deflate, zstd"},
        )
    unpacked = _identity(request) if packing == "identity" else _unpacked(request, packing)
    too_large = ApiError(413, f"The body is larger than {max_bytes} bytes.", code="body_too_large")
    if int(request.headers.get("content-length", "0")) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for part in unpacked:
            body += part
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise ClientDisconnected from None
    except (zlib.error, zstandard.ZstdError, EOFError):
        raise ApiError(400, f"The body is not {packing}.", code="invalid_encoding") from None
    return bytes(body)


def _identity(request: Request) -> AsyncIterator[bytes]:
    return request.stream()


async def _unpacked(request: Request, packing: str) -> AsyncIterator[bytes]:
    """Yield the body in pieces of `_STEP_BYTES` at most."""
    if packing == "zstd":
        # It has no bound of its own on what a piece becomes; pieces that small have one.
        unpacking = zstandard.ZstdDecompressor(max_window_size=2**23).decompressobj()
        async for part in request.stream():
            for start in range(0, len(part), 64):
                yield unpacking.decompress(part[start : start + 64])
        return
    inflating = zlib.decompressobj(zlib.MAX_WBITS | 32 if "gzip" in packing else zlib.MAX_WBITS)
    async for part in request.stream():
        left = part
        while left:
            yield inflating.decompress(left, _STEP_BYTES)
            left = inflating.unconsumed_tail
    if not inflating.eof:
        raise EOFError
