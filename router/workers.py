"""What runs beside the requests: begun again when it fails, and seen while it does not run."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0


class Worker:
    """One thread or task that must run for as long as the process serves.

    What it does ends by returning; an exception is logged and counted, and it begins again, after
    twice the pause each time it fails soon.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_failures = 0
        self._failure = ""
        self._pause_s = 0.0
        self._began_s: float | None = None

    @property
    def failure(self) -> str | None:
        """Why it last failed, until it has run for as long as it paused; None: it is well."""
        if not self._failure or self._ran_s() > self._pause_s:
            return None
        return self._failure

    def start_thread(self, work: Callable[[], None]) -> threading.Thread:
        """Do `work` on a thread of its own until it returns."""
        thread = threading.Thread(
            target=self._repeat, args=(work,), name=f"shoal-{self.name}", daemon=True
        )
        thread.start()
        return thread

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` on the event loop until it returns."""
        while True:
            self._began_s = time.monotonic()
            try:
                return await work()
            except Exception as error:
                self._note(error)
            await asyncio.sleep(self._pause_s)

    def _repeat(self, work: Callable[[], None]) -> None:
        while True:
            self._began_s = time.monotonic()
            try:
                return work()
            except Exception as error:
                self._note(error)
            time.sleep(self._pause_s)

    def _note(self, error: Exception) -> None:
        failed_soon = self._ran_s() <= 2 * _LONGEST_PAUSE_S
        self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s) if failed_soon else 0.0
        self._pause_s = max(_FIRST_PAUSE_S, self._pause_s)
        self._failure, self._began_s = repr(error), None
        self.num_failures += 1
        logger.exception("%s failed, and begins again in %g s", self.name, self._pause_s)

    def _ran_s(self) -> float:
        return 0.0 if self._began_s is None else time.monotonic() - self._began_s
