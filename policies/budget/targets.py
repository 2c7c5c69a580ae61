"""Targets: what may be spent per hour or per thousand requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from policies.errors import PolicyError
from policies.footprint import Footprint

Resource: TypeAlias = Literal["usd", "wh", "gco2e"]
Per: TypeAlias = Literal["hour", "1000_requests"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Spend `amount` of `resource` per hour, or per 1,000 requests, on average over a window.

    A target is an aim held by a price, not a cap: use budgets for what must never be exceeded.
    """

    resource: Resource
    amount: float
    per: Per = "hour"

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("resource", self.resource, get_args(Resource)),
            ("per", self.per, get_args(Per)),
        ):
            if value not in allowed:
                raise PolicyError(
                    f"targets.{key}: {value!r} is unknown; allowed are {', '.join(allowed)}"
                )
        is_number = isinstance(self.amount, int | float) and not isinstance(self.amount, bool)
        if not is_number or not 0 < self.amount < float("inf"):
            raise PolicyError(f"targets.amount: {self.amount!r} is not a number above zero")

    def budget(self, *, elapsed_s: float, num_requests: float) -> float:
        """Return what may be spent in `elapsed_s` seconds with `num_requests` requests."""
        if self.per == "hour":
            return self.amount * elapsed_s / 3600
        return self.amount * num_requests / 1000


def spent(cost: Footprint, resource: Resource) -> float:
    """Return how much of `resource` `cost` is."""
    return {"usd": cost.usd, "wh": cost.wh, "gco2e": cost.gco2e}[resource]
