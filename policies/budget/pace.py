"""Pace: how much traffic the rest of the window holds, learned from the days before.

Offline, the best price is one price for the whole window: whoever spends evenly by the clock pays
too much at night and starves at noon. To come close online, the controller needs to know how many
requests are still to come, and how dirty their electricity will be. It learns both by time of day.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 96
# How far yesterday's profile yields to today: one day counts half.
_SMOOTHING = 0.5
# Today's level weighs against yesterday's like this share of a day's traffic: bursts pass.
_LEVEL_PRIOR = 0.25
# Profiles are averaged over this many bins each side, so that yesterday's bursts do not recur.
_SMOOTH_BINS = 2
# Before the first profile is known, one minute is the least to judge a rate by.
_MIN_ELAPSED_S = 60.0
# The forecast reaches at least this share of a window ahead, into the next one if need be, so that
# the last requests of a window are neither starved nor spoilt.
_MIN_HORIZON = 1 / 24


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """What is to come: the requests of each future bin, and what part of them is this window's.

    `seconds` are left of this window. `beyond` is the traffic after its end that the forecast
    includes, as a share of a whole window's. `intensity` is each bin's expected carbon intensity
    relative to now's, aligned with `requests`.
    """

    seconds: float
    beyond: float
    requests: NDArray[np.float64]
    intensity: NDArray[np.float64]

    @property
    def num_requests(self) -> float:
        """All requests to come, at least one."""
        return max(1.0, float(self.requests.sum()))


class Pace:
    """Counts requests by time of window and forecasts the rest of it. Not thread-safe."""

    def __init__(self, *, window_s: float) -> None:
        self.window_s = window_s
        self._bin_s = window_s / NUM_BINS
        self._counts = np.zeros(NUM_BINS)
        self._intensity_today = np.full(NUM_BINS, np.nan)
        self._profile: NDArray[np.float64] | None = None
        self._intensity_profile: NDArray[np.float64] | None = None
        self._started_s: float | None = None
        self._window: int | None = None
        self._elapsed_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds of this window in which requests could be seen, up to the last one counted."""
        return self._elapsed_s

    @property
    def num_requests(self) -> float:
        """Requests counted in this window."""
        return float(self._counts.sum())

    def count(self, now_s: float, *, intensity: float, requests: float = 1.0) -> bool:
        """Count requests at `now_s` at this carbon intensity; return whether a window began."""
        window = int(now_s // self.window_s)
        began = window != self._window
        if began:
            self._roll(now_s, window)
        assert self._started_s is not None
        here = self._bin(now_s)
        self._counts[here] += requests
        self._intensity_today[here] = intensity
        self._elapsed_s = max(self._elapsed_s, now_s - self._started_s)
        return began

    def reconcile(self, now_s: float, *, num_requests: int, first_request_s: float) -> None:
        """Count what others know of this window: `num_requests` in all since `first_request_s`.

        To be called in a window that has begun. Requests that were not counted here are put where
        they may have been: since the last time, or evenly since the first one after a restart.
        """
        assert self._started_s is not None
        here = self._bin(now_s)
        missing = num_requests - self.num_requests
        first = min(self._bin(first_request_s), here)
        if first_request_s < self._started_s:
            self._started_s = first_request_s
            self._elapsed_s = max(self._elapsed_s, now_s - first_request_s)
        else:
            first = here
        if missing > 0:
            self._counts[first : here + 1] += missing / (here + 1 - first)

    def horizon(self, now_s: float) -> Horizon:
        """Return the forecast from `now_s` to the end of the window, or a little beyond."""
        here = self._bin(now_s)
        start_s = (now_s // self.window_s) * self.window_s
        window_left_s = start_s + self.window_s - now_s
        left_s = max(window_left_s, self.window_s * _MIN_HORIZON)
        left_in_bin = min(1.0, ((here + 1) * self._bin_s - (now_s - start_s)) / self._bin_s)
        # Bins ahead with the share of each that is ahead; indices beyond the end wrap around.
        num_bins = int(np.ceil(left_s / self._bin_s - left_in_bin - 1e-9)) + 1
        bins = (here + np.arange(num_bins)) % NUM_BINS
        shares = np.ones(num_bins)
        shares[0] = left_in_bin
        shares[-1] = max(0.0, left_s / self._bin_s - shares[:-1].sum())
        beyond = bins < here
        if self._profile is None:
            rate = self.num_requests / max(self._elapsed_s, _MIN_ELAPSED_S)
            requests = np.full(num_bins, rate * self._bin_s) * shares
            per_window = rate * self.window_s
        else:
            level = self._level(here, 1 - left_in_bin)
            requests = self._profile[bins] * level * shares
            per_window = float(self._profile.sum()) * level
        return Horizon(
            seconds=window_left_s,
            beyond=float(requests[beyond].sum()) / max(per_window, 1e-9),
            requests=requests,
            intensity=self._relative(here, bins),
        )

    def _level(self, here: int, share_of_bin: float) -> float:
        """Return today's traffic relative to the profile's, drawn towards one early in the day."""
        assert self._profile is not None
        expected = self._profile[:here].sum() + share_of_bin * self._profile[here]
        prior = _LEVEL_PRIOR * self._profile.sum()
        return float((self.num_requests + prior) / max(expected + prior, 1e-9))

    def _relative(self, here: int, bins: NDArray[np.int_]) -> NDArray[np.float64]:
        """Return the grid's rhythm; a day dirtier than yesterday is taken to stay so."""
        profile = self._intensity_profile
        if profile is None or not profile[here] > 0:
            return np.ones(len(bins))
        relative = profile[bins] / profile[here]
        return np.where(np.isfinite(relative) & (relative > 0), relative, 1.0)

    def _bin(self, now_s: float) -> int:
        return min(NUM_BINS - 1, int((now_s % self.window_s) / self._bin_s))

    def _roll(self, now_s: float, window: int) -> None:
        # A window that was seen only in part says nothing of the part that was not.
        full = self._started_s is not None and self._started_s % self.window_s < self._bin_s
        if full:
            self._profile = _blend(self._profile, _smooth(self._counts))
            seen = _fill(self._intensity_today)
            self._intensity_profile = _blend(self._intensity_profile, seen)
        self._counts = np.zeros(NUM_BINS)
        self._intensity_today = np.full(NUM_BINS, np.nan)
        first = self._window is None
        self._started_s = now_s if first else window * self.window_s
        self._window = window
        self._elapsed_s = 0.0


def _blend(old: NDArray[np.float64] | None, new: NDArray[np.float64]) -> NDArray[np.float64]:
    return new.copy() if old is None else _SMOOTHING * new + (1 - _SMOOTHING) * old


def _smooth(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the circular moving average."""
    shifts = range(-_SMOOTH_BINS, _SMOOTH_BINS + 1)
    mean: NDArray[np.float64] = np.mean([np.roll(counts, shift) for shift in shifts], axis=0)
    return mean


def _fill(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `values` with gaps filled from the nearest earlier bin (bins without requests)."""
    filled = values.copy()
    last = float("nan")
    for index, value in enumerate(filled):
        if np.isnan(value):
            filled[index] = last
        else:
            last = float(value)
    return filled
