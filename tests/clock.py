"""Time in tests: a clock that they move, and waiting for what another thread does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that another thread brings about, and tells nobody of."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
