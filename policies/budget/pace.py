"""Pace: how much traffic the rest of a window holds, learned from the windows before.

Whoever spends evenly by the clock pays too much at night and starves at noon. So the controller
needs to know how many requests are still to come, and how dirty their electricity will be: both
are learned by time of window. It knows nothing of costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 96
# How far the windows before yield to the last one: it counts half.
_SMOOTHING = 0.5
# Counts are averaged over this many bins each side, so that yesterday's bursts do not recur.
_SMOOTH_BINS = 2
# Today's level is that of the windows before, until as much traffic as twice theirs says otherwise:
# bursts pass.
_LEVEL_PRIOR = 2.0
# In a first window, one minute is the least to judge a rate by.
_MIN_ELAPSED_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What is left of a window: `seconds`, its `share`, and the `requests` that it may hold.

    `dirty_requests` are these in requests at the present carbon intensity: one that comes when the
    grid is twice as dirty counts twice. Both are at least one. `known` says that a whole window
    has been seen before.
    """

    seconds: float
    share: float
    requests: float
    dirty_requests: float
    known: bool


class Pace:
    """Counts requests by time of window and forecasts the rest of it. Not thread-safe."""

    def __init__(
        self, *, window_s: float, announced: Callable[[float], float | None] | None = None
    ) -> None:
        """Take the windows' length and what tells the intensity announced for a Unix time."""
        self.window_s = window_s
        self.num_requests = 0.0
        self._announced = announced
        self._bin_s = window_s / NUM_BINS
        self._window: int | None = None
        self._started_s = 0.0
        self._counts = np.zeros(NUM_BINS)
        self._intensities = np.full(NUM_BINS, np.nan)
        self._usual_counts: NDArray[np.float64] | None = None
        self._usual_intensities: NDArray[np.float64] | None = None
        self._forecast()

    @property
    def started_s(self) -> float:
        """Unix time from which on requests of this window could be seen."""
        return self._started_s

    def count(self, now_s: float, *, intensity: float, requests: int = 1) -> bool:
        """Count requests at `now_s` at this carbon intensity; return whether a window began."""
        window = int(now_s // self.window_s)
        began = window != self._window
        if began:
            self._begin(now_s, window)
        here = self._bin(now_s)
        self._counts[here] += requests
        self._intensities[here] = intensity
        self.num_requests += requests
        return began

    def reconcile(self, now_s: float, *, num_requests: int, first_request_s: float) -> None:
        """Count what others know of this window: `num_requests` in all since `first_request_s`.

        To be called in a window that has begun. Requests that were not counted here are put where
        they may have been: since the last time, or evenly since the first one after a restart.
        """
        first = here = self._bin(now_s)
        if first_request_s < self._started_s:
            self._started_s = first_request_s
            first = min(self._bin(first_request_s), here)
        missing = num_requests - self.num_requests
        if missing > 0:
            self._counts[first : here + 1] += missing / (here + 1 - first)
            self.num_requests += missing

    def rest(self, now_s: float) -> Rest:
        """Return the forecast from `now_s` to the end of the window; takes microseconds."""
        passed_s = now_s % self.window_s
        here = self._bin(now_s)
        ahead = here + 1 - passed_s / self._bin_s
        usual, dirty = (
            sums[here + 1] + ahead * (sums[here] - sums[here + 1]) for sums in self._to_come
        )
        total = self._to_come[0][0]
        if self._usual_counts is None:
            # Flat, at the rate seen so far; the sums are in bins.
            seen_s = max(now_s - self._started_s, _MIN_ELAPSED_S)
            level = self.num_requests / (seen_s / self._bin_s)
        else:
            prior = _LEVEL_PRIOR * total
            level = (self.num_requests + prior) / max(total - usual + prior, 1e-9)
        relative = self._rhythm[here]
        left_s = self.window_s - passed_s
        return Rest(
            seconds=left_s,
            share=left_s / self.window_s,
            requests=max(1.0, level * usual),
            dirty_requests=max(1.0, level * (dirty / relative if relative > 0 else usual)),
            known=self._usual_counts is not None,
        )

    def _bin(self, now_s: float) -> int:
        return min(NUM_BINS - 1, int((now_s % self.window_s) / self._bin_s))

    def _begin(self, now_s: float, window: int) -> None:
        # A window that was seen only in part says nothing of the part that was not.
        if self._window is not None and self._started_s % self.window_s < self._bin_s:
            self._usual_counts = _blend(self._usual_counts, _smooth(self._counts))
            self._usual_intensities = _blend(self._usual_intensities, _filled(self._intensities))
        self._started_s = now_s if self._window is None else window * self.window_s
        self._window = window
        self.num_requests = 0.0
        self._counts = np.zeros(NUM_BINS)
        self._intensities = np.full(NUM_BINS, np.nan)
        self._forecast()

    def _forecast(self) -> None:
        """Sum up, from each bin to the window's end, the usual requests, plain and as dirty."""
        rhythm = self._expected_intensities()
        usual = np.ones(NUM_BINS) if self._usual_counts is None else self._usual_counts
        self._rhythm: list[float] = rhythm.tolist()
        self._to_come: list[list[float]] = [
            [*np.cumsum(each[::-1])[::-1].tolist(), 0.0] for each in (usual, usual * rhythm)
        ]

    def _expected_intensities(self) -> NDArray[np.float64]:
        """Return the grid's rhythm: the announced one, else that of the windows before.

        A day that is dirtier than this rhythm is taken to stay so.
        """
        if self._announced is not None and self._window is not None:
            middles_s = (self._window + (np.arange(NUM_BINS) + 0.5) / NUM_BINS) * self.window_s
            announced = [self._announced(time_s) for time_s in middles_s.tolist()]
            if all(announced):
                return np.array(announced, dtype=np.float64)
        usual = self._usual_intensities
        if usual is None or not np.isfinite(usual).all():
            return np.ones(NUM_BINS)
        return usual


def _blend(old: NDArray[np.float64] | None, new: NDArray[np.float64]) -> NDArray[np.float64]:
    return new.copy() if old is None else _SMOOTHING * new + (1 - _SMOOTHING) * old


def _smooth(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the circular moving average."""
    shifts = range(-_SMOOTH_BINS, _SMOOTH_BINS + 1)
    mean: NDArray[np.float64] = np.mean([np.roll(counts, shift) for shift in shifts], axis=0)
    return mean


def _filled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `values` with the gaps of bins without requests filled from the one before."""
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
        return values
    before = np.maximum(np.searchsorted(known, np.arange(len(values)), side="right") - 1, 0)
    filled: NDArray[np.float64] = values[known[before]]
    return filled
