"""How a request's body is read: bounded, unpacked, and parsed where it holds nobody up.

Parsing holds the interpreter's lock for as long as a body has values, and every other request waits
meanwhile. So what a body holds is counted before it is parsed, which costs little more than a copy,
and long bodies are parsed one after another, for senders in turn, on a thread of their own, with
rests between.

Of what a server holds that it has not read to its end and parsed, a sender may take as much again
as all of them leave free: alone half of the room, two of them a third each. So there is always room
for who comes next, whatever the others do, and no figure for each sender to set (the rule by which
switches share a buffer: Choudhury and Hahne 1998). The first `FREE_BYTES` of a body are never
refused: behind a proxy many clients are one sender, and thousands of its connections that send a
little and stop must not deny the others what most requests are.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TypeVar

import zstandard
from starlette.requests import ClientDisconnect, Request

from models.fair import CLIENT, FairThreads
from router.errors import ApiError, bad_request, retry_headers
from router.streams import ClientDisconnected

FREE_BYTES = 2**14
"""As many of each body count but find room in any case; connections bound how many there are."""


class Room:
    """Room for `max_bytes` of bodies. Used on the event loop only."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._of_sender: Counter[str] = Counter()

    def hold(self, sender: str) -> Held:
        """Return what one body of `sender` takes, for use as a context."""
        return Held(self, sender)

    def take(self, sender: str, num_bytes: int, *, in_any_case: bool = False) -> None:
        """Take some of the room; raises `ApiError`: 429, or 503 where others have it all."""
        own = self._of_sender[sender] + num_bytes
        free = self.max_bytes - self.num_bytes - num_bytes
        if own > free and not in_any_case:
            raise self._refusal(own, others=self.num_bytes + num_bytes - own)
        self.num_bytes += num_bytes
        self._of_sender[sender] = own

    def give(self, sender: str, num_bytes: int) -> None:
        """Give some of it back."""
        self.num_bytes -= num_bytes
        self._of_sender[sender] -= num_bytes
        if self._of_sender[sender] <= 0:
            del self._of_sender[sender]

    def _refusal(self, own: int, others: int) -> ApiError:
        at_fault = own > others
        return ApiError(
            429 if at_fault else 503,
            f"{'You send' if at_fault else 'Others send'} too much at once: your bodies on their "
            f"way would take {own} bytes, those of others take {others}, and a sender may have "
            f"half of what others leave of {self.max_bytes} (limits.max_arriving_mb). "
            "Send one after another.",
            kind="rate_limit_error" if at_fault else "server_error",
            code="too_much_at_once",
            headers=retry_headers(1.0),
        )


class Held:
    """What one body takes of the room, until its context ends or it is released."""

    def __init__(self, room: Room, sender: str) -> None:
        self._room = room
        self._sender = sender
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count that more has come; raises `ApiError` where there is no room for it."""
        is_short = self._num_bytes + num_bytes <= FREE_BYTES
        self._room.take(self._sender, num_bytes, in_any_case=is_short)
        self._num_bytes += num_bytes

    def release(self) -> None:
        """Give the room back; idempotent."""
        self._room.give(self._sender, self._num_bytes)
        self._num_bytes = 0

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


T = TypeVar("T")

# How much is unpacked at a time: a small body may claim to hold a very large one.
_STEP_BYTES = 2**16
STRING = 5
"""What a string counts: it takes so many times as long to parse as a number."""
_SLICE_BYTES = 2**14
# Below this, parsing takes less time than handing it to a thread is worth.
_INLINE_BYTES = 2**14
# The thread leaves the lock alone for so many times as long as a long body took.
_REST = 2.0


class Bodies:
    """Reads the bodies of one server's requests.

    Each has at most `max_bytes` and `max_values`, and arrives within `timeout_s`; together they
    have `max_arriving_bytes` until they are parsed.
    """

    def __init__(
        self, *, max_bytes: int, max_values: int, timeout_s: float, max_arriving_bytes: int
    ) -> None:
        self.max_bytes = max_bytes
        self.max_values = max_values
        self.timeout_s = timeout_s
        self.room = Room(max_arriving_bytes)
        # One: every thread that parses is another that the event loop waits for.
        self._thread = FairThreads(1, "shoal-bodies")
        self._rests_until_s = 0.0  # monotonic

    def hold(self, request: Request, key_id: str | None) -> Held:
        """Return what the body takes of the room, for use as a context, in the name of its key or
        address, for which the request's task then works.
        """
        sender = key_id or address_of(request)
        CLIENT.set(sender)
        return self.room.hold(sender)

    async def take(
        self,
        request: Request,
        parse: Callable[[bytes], T],
        key_id: str | None,
        max_bytes: int | None = None,
    ) -> T:
        """Return what `parse` makes of the body that `key_id` sends; see `read` and `parse`."""
        with self.hold(request, key_id) as held:
            return await self.parse(parse, await self.read(request, held, max_bytes))

    async def read(self, request: Request, held: Held, max_bytes: int | None = None) -> bytes:
        """Return the request's body, unpacked; `max_bytes` may be less than the server's.

        What has come is `held`. Raises `ApiError`: 413 if it is longer, 408 if it comes too
        slowly, 415 for what is packed in an unknown way, 429 or 503 for too much at once, 400 for
        what cannot be unpacked; and `ClientDisconnected`.
        """
        most = min(max_bytes or self.max_bytes, self.max_bytes)
        packing = request.headers.get("content-encoding", "identity").strip().lower()
        if packing not in ("identity", "gzip", "x-gzip", "deflate", "zstd"):
            raise ApiError(
                415,
                f"content-encoding: {packing[:40]!r} is unknown; allowed are gzip, deflate, zstd.",
                code="unsupported_encoding",
                headers={"accept-encoding": "gzip, deflate, zstd"},
            )
        unpacked = request.stream() if packing == "identity" else _unpacked(request, packing)
        too_large = ApiError(
            413,
            f"The body is larger than {most} bytes (limits.max_body_bytes).",
            code="body_too_large",
        )
        if int(request.headers.get("content-length", "0")) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.timeout_s):
                async for part in unpacked:
                    held.add(len(part))
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408,
                f"The body did not arrive within {self.timeout_s:g} s (limits.body_timeout_s).",
                code="body_timeout",
            ) from None
        except ClientDisconnect:
            raise ClientDisconnected from None
        except (zlib.error, zstandard.ZstdError, EOFError):
            raise ApiError(400, f"The body is not {packing}.", code="invalid_encoding") from None
        return bytes(body)

    async def parse(self, parse: Callable[[bytes], T], body: bytes) -> T:
        """Return what `parse` makes of `body`; raises `ApiError`, 400, before it for one too many.

        `parse` runs on another thread where the body is long.
        """
        if len(body) <= _INLINE_BYTES:
            return self._counted(parse, body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._in_turn, parse, body)

    def _in_turn(self, parse: Callable[[bytes], T], body: bytes) -> T:
        time.sleep(max(0.0, self._rests_until_s - time.monotonic()))
        began_s = time.thread_time()
        try:
            return self._counted(parse, body)
        finally:
            took_s = time.thread_time() - began_s
            self._rests_until_s = time.monotonic() + _REST * took_s

    def _counted(self, parse: Callable[[bytes], T], body: bytes) -> T:
        if has_more_values(body, self.max_values):
            raise bad_request(
                f"The body holds more than {self.max_values} JSON values (limits.max_body_values):"
                f" lists, objects, commas, and strings, which count as {STRING} each",
                code="body_too_complex",
            )
        return parse(body)


def has_more_values(body: bytes, most: int) -> bool:
    """Whether the JSON `body` holds more than `most` lists, objects and commas, and `STRING`s.

    What stands in strings does not count. Goes by slices, with functions that run at the speed of
    memory: between them other threads may take the interpreter's lock.
    """
    num_marks = num_quotes = start = 0
    while start < len(body):
        piece = body[start : start + _SLICE_BYTES]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # what it ends with escapes what follows
            piece = body[start : start + _SLICE_BYTES + 1]
        start += len(piece)
        plain = piece.replace(rb"\\", b"").replace(rb"\"", b"")
        parts = plain.split(b'"')
        outside = b"".join(parts[num_quotes % 2 :: 2])
        num_quotes += len(parts) - 1
        num_marks += outside.count(b",") + outside.count(b"[") + outside.count(b"{")
        if num_marks + STRING * (num_quotes // 2) > most:
            return True
    return False


def address_of(request: Request) -> str:
    """Return where a request comes from: as a proxy on this machine says, if one passed it on."""
    return request.client.host if request.client else ""


async def _unpacked(request: Request, packing: str) -> AsyncIterator[bytes]:
    """Yield the body in pieces of about `_STEP_BYTES`, and let others run between them."""
    if packing == "zstd":
        # It has no bound of its own on what a piece becomes; pieces that small have one.
        unpacking = zstandard.ZstdDecompressor(max_window_size=2**23).decompressobj()
        async for part in request.stream():
            for start in range(0, len(part), 64):
                yield unpacking.decompress(part[start : start + 64])
                if start % _STEP_BYTES == 0:
                    await asyncio.sleep(0)
        return
    bits = zlib.MAX_WBITS | 32 if "gzip" in packing else zlib.MAX_WBITS
    inflating = zlib.decompressobj(bits)
    async for part in request.stream():
        left = part
        while left:
            if inflating.eof:  # of one part of several: together they are the whole
                inflating = zlib.decompressobj(bits)
            yield inflating.decompress(left, _STEP_BYTES)
            left = inflating.unconsumed_tail or inflating.unused_data
            await asyncio.sleep(0)
    if not inflating.eof:
        raise EOFError
