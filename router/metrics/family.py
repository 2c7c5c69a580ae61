"""What a metric is: its name, kind, labels, and how several replicas' gauges become one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]
Merge: TypeAlias = Literal["mean", "sum", "max"]

# A family's name and its labels' values; a histogram's bucket, or SUM, comes last.
Series: TypeAlias = tuple[str, ...]
Values: TypeAlias = Mapping[Series, float]

SUM = "sum"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One metric with its labels.

    `buckets` are a histogram's upper bounds, ascending, infinity left out. `merge` says what the
    replicas' gauges of the same labels become.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Merge = "mean"

    def __post_init__(self) -> None:
        assert (self.kind == "counter") == self.name.endswith("_total"), self.name
        assert (self.kind == "histogram") == bool(self.buckets), self.name
        # What a value is stored under in its bucket.
        object.__setattr__(self, "_bounds", (*map(str, self.buckets), "inf"))

    def series(self, *labels: str) -> Series:
        """Return the series with these labels' values."""
        assert len(labels) == len(self.labels), (self.name, labels)
        return (self.name, *labels)

    def bucket(self, value: float) -> str:
        """Return the name of the bucket that `value` falls into."""
        bounds: tuple[str, ...] = self._bounds  # type: ignore[attr-defined]
        return bounds[bisect_left(self.buckets, value)]
