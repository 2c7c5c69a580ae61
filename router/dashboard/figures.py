"""Everything that the page shows of the ledger, as fresh as its cost allows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from router.caps.limits import Cap
from router.dashboard.caps import spent_of_caps
from router.dashboard.choices import choices
from router.dashboard.spending import spending
from router.dashboard.windows import WINDOWS
from router.ledger.database import Database

# All pages together keep the database busy for at most this share of the time.
_SHARE = 0.05
_FRESH_S = 1.0


class Figures:
    """The figures of one replica's pages. `clock` is Unix time; used on one event loop."""

    def __init__(
        self,
        database: Database,
        caps: Sequence[Cap],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._caps = tuple(caps)
        self._clock = clock
        self._kept: dict[str, tuple[float, dict[str, Any]]] = {}
        self._querying = asyncio.Lock()

    async def of(self, window: str) -> dict[str, Any]:
        """Return the figures of the window called `window`; `KeyError` if there is none.

        They are kept for a second, or for as long as keeps the database free for requests.
        """
        async with self._querying:
            until_s, found = self._kept.get(window, (0.0, {}))
            if self._clock() < until_s:
                return found
            began_s = time.perf_counter()
            found = await asyncio.to_thread(self._query, window)
            took_s = time.perf_counter() - began_s
            self._kept[window] = (self._clock() + max(_FRESH_S, took_s / _SHARE), found)
            return found

    def _query(self, name: str) -> dict[str, Any]:
        window, now_s = WINDOWS[name], self._clock()
        with self._database.connect() as connection:
            return {
                "object": "dashboard",
                "window": name,
                "windows": list(WINDOWS),
                "now_s": now_s,
                "bucket_s": window.bucket_s,
                **spending(connection, window, now_s=now_s),
                "choices": choices(connection, since_s=window.starts_s(now_s)[0]),
                "budgets": spent_of_caps(connection, self._caps, now_s=now_s),
            }
