"""What budgets count, caps by name ("usd_per_day"), and the windows over which they count.

Amounts are integers, so that no sum ever drifts. Windows are those of the UTC calendar, not
rolling: a person can see when a budget starts anew, and one counter per window is exact. The price,
which rolling windows would not have: around a window's end up to twice the cap can be spent within
one window's length. A request counts in the window in which it was admitted, however long it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple, TypeAlias, get_args

from pydantic import Field, field_validator

from policies.footprint import Cost
from policies.kinds import Strict

Resource: TypeAlias = Literal["requests", "tokens", "usd", "wh", "gco2e"]

RESOURCES: tuple[Resource, ...] = ("requests", "tokens", "usd", "wh", "gco2e")
UNITS = {"requests": "requests", "tokens": "tokens", "usd": "USD", "wh": "Wh", "gco2e": "gCO2e"}

Period: TypeAlias = Literal["minute", "hour", "day", "month"]
PERIODS: tuple[Period, ...] = get_args(Period)
SERVER = "server"
TEAM = "team_"  # how the ids of teams begin

MOST = 2**53  # of one request: nine million USD
_MOST_SUM = 2**63 - 1  # what a column holds

CAP_NAMES = tuple(f"{resource}_per_{period}" for resource in RESOURCES for period in PERIODS)


class CapError(ValueError):
    """A cap that cannot be read: names the key, the value and what is allowed."""


class BudgetExhausted(RuntimeError):
    """A request that does not fit a budget.

    `final` is True when the budget is spent, so that asking again before `reset_s` (Unix time)
    is useless: 429 with `x-should-retry: false`. False when requests in flight hold what is
    left: asking again in a moment is right. `headers` are the x-ratelimit headers.
    """

    def __init__(
        self, message: str, cap: str, reset_s: float, final: bool, headers: dict[str, str]
    ) -> None:
        super().__init__(message, cap, reset_s, final, headers)
        self.message = message
        self.cap = cap
        self.reset_s = reset_s
        self.final = final
        self.headers = headers

    def __str__(self) -> str:
        return self.message


class BudgetUnavailable(RuntimeError):
    """Budgets cannot be checked now; a capped request is refused rather than left uncounted."""


class Amounts(NamedTuple):
    """An amount of each resource: whole requests and tokens, billionths of USD, Wh and gCO2e."""

    requests: int = 0
    tokens: int = 0
    nano_usd: int = 0
    nano_wh: int = 0
    nano_gco2e: int = 0

    @classmethod
    def of(cls, *, requests: int = 1, tokens: int, cost: Cost) -> Amounts:
        """Return `requests` requests that took `tokens` tokens and cost `cost`, none above MOST."""
        billionths = (max(0.0, x) * 1e9 for x in (cost.usd, cost.wh, cost.gco2e))
        return cls(
            min(requests, MOST),
            min(tokens, MOST),
            *(math.ceil(x) if x < MOST else MOST for x in billionths),
        )

    def plus(self, other: Amounts) -> Amounts:
        """Return the sum, as much of it as the database holds."""
        return Amounts(*(min(a + b, _MOST_SUM) for a, b in zip(self, other, strict=True)))

    def minus(self, other: Amounts) -> Amounts:
        """Return the difference."""
        return Amounts(*(a - b for a, b in zip(self, other, strict=True)))

    def get(self, resource: Resource) -> int:
        """Return the amount of `resource`."""
        return self[RESOURCES.index(resource)]


NOTHING = Amounts()


def to_integer(resource: Resource, value: float) -> int:
    """Return `value` in the unit in which `resource` is counted."""
    return round(value) if resource in {"requests", "tokens"} else round(value * 1e9)


def to_number(resource: Resource, amount: int) -> float:
    """Return `amount` in the resource's own unit, the inverse of `to_integer`."""
    return amount if resource in {"requests", "tokens"} else amount / 1e9


def to_text(resource: Resource, amount: int) -> str:
    """Return `amount` for a person: "12 requests", "0.0305 USD"."""
    return f"{to_number(resource, amount):.10g} {UNITS[resource]}"


@dataclass(frozen=True, kw_only=True)
class Window:
    """One period of one scope's spending: `scope` is a key's id, a team's, or "server" for all."""

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


def rate_limit_headers(remaining: Iterable[tuple[Limit, int]], now_s: float) -> dict[str, str]:
    """Return x-ratelimit-{limit,remaining,reset}-{requests,tokens} of the tightest limits.

    Caps on money, energy and carbon have no such header; their errors say what is left.
    """
    headers = {}
    entries = list(remaining)
    for resource in ("requests", "tokens"):
        found = [entry for entry in entries if entry[0].cap.resource == resource]
        if not found:
            continue
        limit, left = min(found, key=lambda entry: entry[1])
        headers[f"x-ratelimit-limit-{resource}"] = str(limit.cap.limit)
        headers[f"x-ratelimit-remaining-{resource}"] = str(left)
        headers[f"x-ratelimit-reset-{resource}"] = duration(limit.window.end_s - now_s)
    return headers


def duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: "850ms", "12s", "6m0s", "3h0m12s"."""
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))}ms"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


class BudgetsConfig(Strict):
    """The `budgets:` section of the configuration; windows are UTC's.

    Caps are as in {"usd_per_day": 5, "tokens_per_minute": 20000}. `server` bounds all requests
    together, `per_key` every key that has no cap of that name of its own. A request that doesn't
    fit only because others in flight hold the rest waits at most `wait_s` for them. What a replica
    holds when it dies comes back after `lease_s`.
    """

    server: dict[str, float] = Field(default_factory=dict)
    per_key: dict[str, float] = Field(default_factory=dict)
    wait_s: float = Field(2.0, ge=0, le=60)
    lease_s: float = Field(15.0, ge=1, le=3600)

    @field_validator("server", "per_key")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        read_caps(value, "caps")
        return value

    def server_caps(self) -> tuple[Cap, ...]:
        """Return the caps of all requests together."""
        return read_caps(self.server, "budgets.server")

    def key_caps(self, own: tuple[Cap, ...]) -> tuple[Cap, ...]:
        """Return the caps of a key with caps of its `own`."""
        named = {cap.name: cap for cap in read_caps(self.per_key, "budgets.per_key")}
        return tuple((named | {cap.name: cap for cap in own}).values())
