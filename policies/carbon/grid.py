"""The grid's carbon intensity: a table, a schedule from a file, or a cached live feed.

Nothing here talks to a network: a feed pushes readings into `CachedGrid`, which decides how long
to trust them.
"""

from __future__ import annotations

import csv
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Protocol

from policies.errors import CarbonError

GRID_FOLDER = Path(__file__).parent.parent / "data" / "grid"
CLOUDS = ("gcp", "aws", "azure")
_YEARLY_CHANGE = 0.25
_UNDATED = 5  # years, for rows whose source names none
# Work that may wait: in steps of so many seconds, as if it took so many times as long as it seems.
_STEP_S = 900.0
_MARGIN = 1.5


@dataclass(frozen=True, kw_only=True)
class GridReading:
    """Carbon intensity at a moment: gCO2e per kWh and where the figure comes from.

    `source` is "table:DE", "file:intensity.csv", "live:DE", or "fallback:DE" where a live feed has
    gone stale. The true figure is that divided or multiplied by at most `factor`, as far as the
    table's age goes: 1 where somebody states the hours.
    """

    gco2e_per_kwh: float
    source: str
    factor: float = 1.0


class GridIntensity(Protocol):
    """Answers what the grid's carbon intensity is. Cheap, thread-safe, never raises."""

    def at(self, now_s: float) -> GridReading:
        """Return the reading for Unix time `now_s`."""
        ...

    def announced(self, then_s: float) -> float | None:
        """Return the gCO2e per kWh announced for a time to come; None where nothing is."""
        ...


@dataclass(frozen=True, kw_only=True)
class GridZone:
    """A row of the shipped tables: a country or a cloud region."""

    key: str
    name: str
    gco2e_per_kwh: float
    source: str
    year: int | None

    @property
    def factor(self) -> float:
        """How far the mean of a year may have moved since (`GridReading.factor`).

        From one year to the next it moved by a factor of exp(0.25) in the standard deviation, over
        158 pairs of years of Google's regions, 2019 to 2024 (`gcp-region-carbon-info`); over more
        years by the root of their number more, as a random walk does.
        """
        now = datetime.now(UTC).year
        return math.exp(_YEARLY_CHANGE * math.sqrt(max(now - (self.year or now - _UNDATED), 0)))


def find_zone(key: str) -> GridZone:
    """Return a zone by two- or three-letter country code, WORLD, or "cloud:region".

    For example "DE", "DEU", "gcp:us-central1", "azure:westeurope". Case does not matter. Raises
    `CarbonError` that says what is allowed.
    """
    zones = load_zones()
    found = zones.get(key.lower())
    if found is not None:
        return found
    cloud, colon, _ = key.lower().partition(":")
    if colon and cloud in CLOUDS:
        near = sorted(name for name in zones if name.startswith(f"{cloud}:"))
        raise CarbonError(f"zone: {key!r} is unknown; {cloud} regions are {', '.join(near)}")
    raise CarbonError(
        f"zone: {key!r} is unknown; allowed are ISO country codes (DE, DEU), WORLD, and cloud "
        "regions (gcp:us-central1, aws:eu-west-1, azure:westeurope)"
    )


@cache
def load_zones() -> dict[str, GridZone]:
    """Read the shipped tables; keys are in lower case."""
    zones = {}
    with (GRID_FOLDER / "zones.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            zone = GridZone(
                key=row["zone"],
                name=row["name"],
                gco2e_per_kwh=float(row["gco2e_per_kwh"]),
                source=f"codecarbon, {row['year']}",
                year=int(row["year"]),
            )
            zones[row["zone"].lower()] = zone
            if row["iso3"]:
                zones[row["iso3"].lower()] = zone
    with (GRID_FOLDER / "regions.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            key = f"{row['cloud']}:{row['region']}"
            zones[key.lower()] = GridZone(
                key=key,
                name=row["name"],
                gco2e_per_kwh=float(row["gco2e_per_kwh"]),
                source=f"{row['source']} {row['year']}".strip(),
                year=int(row["year"]) if row["year"] else None,
            )
    return zones


@dataclass(frozen=True, kw_only=True)
class StaticGrid:
    """One intensity for ever."""

    reading: GridReading

    @classmethod
    def of_zone(cls, key: str) -> StaticGrid:
        """Return the shipped table's value for `key` (see `find_zone`)."""
        zone = find_zone(key)
        return cls(
            reading=GridReading(
                gco2e_per_kwh=zone.gco2e_per_kwh, source=f"table:{zone.key}", factor=zone.factor
            )
        )

    def at(self, now_s: float) -> GridReading:  # noqa: ARG002 - the contract's signature
        """Return the one reading."""
        return self.reading

    def announced(self, then_s: float) -> float | None:  # noqa: ARG002
        """Return nothing: a year's mean says nothing of the hours."""
        return None


def may_wait(
    announced: Callable[[float], float | None], *, now_s: float, until_s: float, work_s: float
) -> bool:
    """Return whether work of `work_s` seconds, due by `until_s`, had better not go on now.

    `announced` gives carbon or money per kWh at a Unix time. A greedy threshold: the work goes on
    in those steps that are cheapest by what is announced and just suffice, with a margin for work
    that takes longer than it seems. Where nothing is announced there is nothing to wait for.
    """
    num_needed = math.ceil(_MARGIN * work_s / _STEP_S)
    times_s = (now_s + step * _STEP_S for step in range(int((until_s - now_s) // _STEP_S)))
    values = [value for value in map(announced, times_s) if value is not None]
    now = announced(now_s)
    if now is None or not 0 < num_needed < len(values):
        return False
    return now > sorted(values)[num_needed - 1]


class ScheduledGrid:
    """Intensities over time, from a file: a daily profile or a time series.

    `times_s` are seconds (since midnight UTC for a profile, Unix time for a series), ascending;
    each value holds from its time to the next. Before the first time of a series its first value
    holds.
    """

    def __init__(
        self,
        times_s: Sequence[float],
        gco2e_per_kwh: Sequence[float],
        *,
        source: str,
        daily: bool = False,
    ) -> None:
        self._times_s = list(times_s)
        self._readings = [
            GridReading(gco2e_per_kwh=value, source=source) for value in gco2e_per_kwh
        ]
        self._daily = daily

    @classmethod
    def read(cls, file: Path, *, column: str = "gco2e_per_kwh") -> ScheduledGrid:
        """Read a CSV with the columns `hour,gco2e_per_kwh` or `time,gco2e_per_kwh`.

        Another `column` holds something else that varies, as prices do. `hour` is 0 to 23.99 UTC
        and repeats every day; `time` is ISO 8601 (UTC where it names no offset). Carbon is never
        below zero, which prices may be. Raises `CarbonError` that names the file, the line and what
        is allowed, also for a time that is there twice, as where clocks were put back.
        """
        try:
            with file.open(newline="") as stream:
                rows = list(csv.DictReader(stream))
        except (OSError, UnicodeDecodeError) as error:
            raise CarbonError(f"grid file {file}: {error}") from None
        columns = set(rows[0]) if rows else set()
        daily = "hour" in columns
        if column not in columns or not ({"hour", "time"} & columns):
            raise CarbonError(
                f"grid file {file}: needs rows under the columns hour,{column} or time,{column}"
            )
        points: dict[float, float] = {}
        least = 0.0 if column == "gco2e_per_kwh" else -math.inf
        for line, row in enumerate(rows, start=2):
            try:
                time_s = float(row["hour"]) * 3600 if daily else _unix_s(row["time"])
                value = float(row[column])
            except (TypeError, ValueError) as error:
                raise CarbonError(f"grid file {file}, line {line}: {error}") from None
            if not (math.isfinite(value) and value >= least):
                allowed = "a number" if least < 0 else "a number >= 0"
                raise CarbonError(f"grid file {file}, line {line}: {column} must be {allowed}")
            if daily and not 0 <= time_s < 86400:
                raise CarbonError(f"grid file {file}, line {line}: an hour is in [0, 24)")
            if time_s in points:
                raise CarbonError(
                    f"grid file {file}, line {line}: {row['hour' if daily else 'time']} is there "
                    "twice; times are UTC unless they name an offset (2026-10-25T02:00+02:00)"
                )
            points[time_s] = value
        return cls(
            sorted(points),
            [points[time_s] for time_s in sorted(points)],
            source=f"file:{file.name}",
            daily=daily,
        )

    def at(self, now_s: float) -> GridReading:
        """Return the value that holds at `now_s`."""
        time_s = now_s % 86400 if self._daily else now_s
        index = bisect_right(self._times_s, time_s) - 1
        # Before a daily profile's first hour, yesterday's last value still holds.
        return self._readings[index if self._daily else max(index, 0)]

    def announced(self, then_s: float) -> float | None:
        """Return the value of the schedule, unless a series has ended by then."""
        if not self._daily and then_s >= self._times_s[-1]:
            return None
        return self.at(then_s).gco2e_per_kwh


class CachedGrid:
    """The last reading of a live feed, trusted for `max_age_s`; after that `fallback` answers.

    Thread-safe: one thread calls `update`, any number call `at`.
    """

    def __init__(self, *, fallback: GridIntensity, max_age_s: float) -> None:
        self._fallback = fallback
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._latest: tuple[float, GridReading] | None = None

    def update(self, reading: GridReading, *, measured_s: float) -> None:
        """Take a reading that the feed says was valid at `measured_s`; older ones are ignored."""
        with self._lock:
            if self._latest is None or measured_s >= self._latest[0]:
                self._latest = (measured_s, reading)

    def at(self, now_s: float) -> GridReading:
        """Return the live reading while it is fresh, else the fallback's, named as such."""
        latest = self._latest
        if latest is not None and now_s - latest[0] <= self._max_age_s:
            return latest[1]
        reading = self._fallback.at(now_s)
        return replace(reading, source=f"fallback:{reading.source.partition(':')[2]}")

    def announced(self, then_s: float) -> float | None:
        """Return what the fallback announces: its rhythm, though perhaps not today's level."""
        return self._fallback.announced(then_s)


def _unix_s(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
