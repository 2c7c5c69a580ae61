"""Caps by name ("usd_per_day") and the calendar windows over which they count.

Windows are those of the UTC calendar, not rolling: a person can see when a budget starts anew,
and one counter per window is exact. The price, which rolling windows would not have: around a
window's end up to twice the cap can be spent within one window's length. A request counts in the
window in which it was admitted, however long it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias, get_args

from router.caps.amounts import RESOURCES, Resource, to_integer
from router.caps.errors import CapError

Period: TypeAlias = Literal["minute", "hour", "day", "month"]
PERIODS: tuple[Period, ...] = get_args(Period)
SERVER = "server"

CAP_NAMES = tuple(f"{resource}_per_{period}" for resource in RESOURCES for period in PERIODS)


@dataclass(frozen=True, kw_only=True)
class Window:
    """One period of one scope's spending: `scope` is a key's id, or "server" for all requests."""

    scope: str
    period: Period
    start_s: int
    end_s: int

    @property
    def id(self) -> str:
        """The window's name in the database."""
        return f"{self.scope}|{self.period}|{self.start_s}"


@dataclass(frozen=True, kw_only=True)
class Cap:
    """At most `limit` (in the resource's integer unit) of `resource` per `period`."""

    resource: Resource
    period: Period
    limit: int

    @property
    def name(self) -> str:
        """The name that configuration uses."""
        return f"{self.resource}_per_{self.period}"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A cap in the window that is open now."""

    cap: Cap
    window: Window


def read_caps(values: Mapping[str, float], where: str) -> tuple[Cap, ...]:
    """Read caps from names and numbers, such as {"usd_per_day": 5}.

    Raises `CapError` that names `where`, the key, the value and what is allowed.
    """
    caps = []
    for name, value in values.items():
        if name not in CAP_NAMES:
            raise CapError(f"{where}: {name!r} is unknown; allowed are {', '.join(CAP_NAMES)}")
        resource, _, period = name.partition("_per_")
        [known] = [r for r in RESOURCES if r == resource]
        [length] = [p for p in PERIODS if p == period]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CapError(f"{where}.{name}: {value!r} is not a number")
        if not (math.isfinite(value) and 0 <= value <= 9e9):
            raise CapError(f"{where}.{name}: {value} is not between 0 and 9e9")
        caps.append(Cap(resource=known, period=length, limit=to_integer(known, value)))
    return tuple(caps)


def limits(scope: str, caps: tuple[Cap, ...], now_s: float) -> tuple[Limit, ...]:
    """Return `caps` of `scope` in the windows that hold the Unix time `now_s`."""
    windows = {cap.period: window(scope, cap.period, now_s) for cap in caps}
    return tuple(Limit(cap=cap, window=windows[cap.period]) for cap in caps)


def window(scope: str, period: Period, now_s: float) -> Window:
    """Return the window of `period` in the UTC calendar that holds the Unix time `now_s`."""
    now = datetime.fromtimestamp(now_s, UTC)
    if period == "month":
        start = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        end = (start + timedelta(days=32)).replace(day=1)
        first, last = int(start.timestamp()), int(end.timestamp())
    else:
        length_s = {"minute": 60, "hour": 3600, "day": 86400}[period]
        first = int(now_s // length_s) * length_s
        last = first + length_s
    return Window(scope=scope, period=period, start_s=first, end_s=last)
