"""How much of requests' bodies a server holds that it has not read to their end and parsed.

A sender may take as much again as all of them leave free: alone half of the room, two of them a
third each. So there is always room for who comes next, whatever the others do, and no figure for
each sender to set (the rule by which switches share a buffer: Choudhury and Hahne 1998). The first
`FREE_BYTES` of a body are never refused: behind a proxy many clients are one sender, and thousands
of its connections that send a little and stop must not deny the others what most requests are.
"""

from __future__ import annotations

from collections import Counter
from types import TracebackType

from router.errors import ApiError, retry_headers

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
