"""What budgets count, in integers, so that no sum ever drifts."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

from policies.footprint import Cost

Resource: TypeAlias = Literal["requests", "tokens", "usd", "wh", "gco2e"]

RESOURCES: tuple[Resource, ...] = ("requests", "tokens", "usd", "wh", "gco2e")
UNITS = {"requests": "requests", "tokens": "tokens", "usd": "USD", "wh": "Wh", "gco2e": "gCO2e"}


class Amounts(NamedTuple):
    """An amount of each resource: whole requests and tokens, billionths of USD, Wh and gCO2e."""

    requests: int = 0
    tokens: int = 0
    nano_usd: int = 0
    nano_wh: int = 0
    nano_gco2e: int = 0

    @classmethod
    def of(cls, *, requests: int = 1, tokens: int, cost: Cost) -> Amounts:
        """Return `requests` requests that took `tokens` tokens and cost `cost`."""
        return cls(
            requests,
            tokens,
            *(math.ceil(max(0.0, x) * 1e9) for x in (cost.usd, cost.wh, cost.gco2e)),
        )

    def plus(self, other: Amounts) -> Amounts:
        """Return the sum."""
        return Amounts(*(a + b for a, b in zip(self, other, strict=True)))

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
