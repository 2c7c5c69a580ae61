"""The spans of time that the page shows, cut into buckets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Window:
    """The last `length_s` seconds, in buckets that begin at multiples of `bucket_s`."""

    length_s: int
    bucket_s: int

    def starts_s(self, now_s: float) -> list[int]:
        """Return the Unix times at which the buckets begin; the last one is still filling."""
        last_s = int(now_s // self.bucket_s) * self.bucket_s
        return list(range(last_s - self.length_s + self.bucket_s, last_s + 1, self.bucket_s))


WINDOWS: Mapping[str, Window] = {
    "15m": Window(length_s=900, bucket_s=10),
    "1h": Window(length_s=3600, bucket_s=60),
    "24h": Window(length_s=86400, bucket_s=900),
    "7d": Window(length_s=7 * 86400, bucket_s=7200),
    "30d": Window(length_s=30 * 86400, bucket_s=28800),
}
