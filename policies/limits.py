"""What one request may cost at most, and how good it must be."""

from __future__ import annotations

from dataclasses import dataclass

from policies.footprint import Footprint


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Ceilings on one request's estimated cost, a latency ceiling and a floor on quality.

    None means no limit. `quality_floor` is a predicted quality in [0, 1]. Costs are estimated at
    the most tokens that the request may take, so a ceiling holds whatever the answer's length.
    """

    max_usd: float | None = None
    max_wh: float | None = None
    max_gco2e: float | None = None
    max_latency_s: float | None = None
    quality_floor: float | None = None

    def exceeded(self, cost: Footprint) -> tuple[str, ...]:
        """Return the names of the ceilings that `cost` is above; empty when it fits."""
        ceilings = (
            ("max_usd", self.max_usd, cost.usd),
            ("max_wh", self.max_wh, cost.wh),
            ("max_gco2e", self.max_gco2e, cost.gco2e),
            ("max_latency_s", self.max_latency_s, cost.latency_s),
        )
        return tuple(
            name for name, ceiling, value in ceilings if ceiling is not None and value > ceiling
        )

    def stricter(self, other: Limits) -> Limits:
        """Return the limits that hold where both do."""
        if other is NO_LIMITS:
            return self
        return Limits(
            max_usd=_least(self.max_usd, other.max_usd),
            max_wh=_least(self.max_wh, other.max_wh),
            max_gco2e=_least(self.max_gco2e, other.max_gco2e),
            max_latency_s=_least(self.max_latency_s, other.max_latency_s),
            quality_floor=max(
                (v for v in (self.quality_floor, other.quality_floor) if v is not None),
                default=None,
            ),
        )

    @property
    def caps_cost(self) -> bool:
        """Whether any ceiling on cost or latency is set."""
        return any(
            value is not None
            for value in (self.max_usd, self.max_wh, self.max_gco2e, self.max_latency_s)
        )


NO_LIMITS = Limits()


def _least(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)
