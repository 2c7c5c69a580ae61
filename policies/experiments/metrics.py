"""What experiments measure: each metric is a sum over a unit's requests per counted request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Direction: TypeAlias = Literal["increase", "decrease"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A mean over those requests that have a value. `direction` is the good one."""

    name: str
    direction: Direction
    unit: str
    meaning: str

    @property
    def is_share(self) -> bool:
        """Whether it lies in [0, 1] by its nature."""
        return self.unit in ("share", "[0, 1]")


def _metric(name: str, direction: Direction, unit: str, meaning: str) -> tuple[str, Metric]:
    return name, Metric(name=name, direction=direction, unit=unit, meaning=meaning)


METRICS: Mapping[str, Metric] = MappingProxyType(
    dict(
        (
            _metric("quality", "increase", "[0, 1]", "feedback, of the requests that have any"),
            _metric("predicted_quality", "increase", "[0, 1]", "the policy's own prediction"),
            _metric("feedback_rate", "increase", "share", "requests with feedback"),
            _metric("usd", "decrease", "USD", "money per request"),
            _metric("wh", "decrease", "Wh", "energy per request"),
            _metric("gco2e", "decrease", "gCO2e", "carbon per request"),
            _metric("latency_s", "decrease", "s", "time to the whole answer"),
            _metric("ttft_s", "decrease", "s", "time to the first text"),
            _metric("tokens", "decrease", "tokens", "read and written by all members"),
            _metric("error_rate", "decrease", "share", "requests that failed at the server"),
            _metric("escalation_rate", "decrease", "share", "requests that needed a later stage"),
        )
    )
)
