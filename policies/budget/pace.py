"""Pace: how much traffic the rest of the window holds, learned from the days before.

Offline, the best price is one price for the whole window: whoever spends evenly by the clock pays
too much at night and starves at noon. To come close online, the controller needs to know how many
requests are still to come, and how dirty their electricity will be. It learns both by time of day.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.budget.rhythms import daily_rhythms, guess_traffic

NUM_BINS = 96
# In a window of a day.
BINS_PER_HOUR = 4
# How far yesterday's profile yields to today: one day counts half.
_SMOOTHING = 0.5
# Today's level weighs against yesterday's like this share of a day's traffic: bursts pass.
_LEVEL_PRIOR = 0.5
_LEVEL_SWEEPS = 8
# Profiles are averaged over this many bins each side, so that yesterday's bursts do not recur.
_SMOOTH_BINS = 2
# One bin's requests count towards today's level up to this multiple of the level: bursts pass.
_BURST = 2.0
# Beyond that, traffic returns from what it is now to its level within about so many bins.
_PASSING_BINS = 4.0
# Before the first profile is known, one minute is the least to judge a rate by.
_MIN_ELAPSED_S = 60.0
# The forecast reaches at least this share of a window ahead, into the next one if need be, so that
# the last requests of a window are neither starved nor spoilt.
_MIN_HORIZON = 1 / 96


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

    def __init__(
        self, *, window_s: float, announced: Callable[[float], float | None] | None = None
    ) -> None:
        self.window_s = window_s
        self._announced = announced
        self._bin_s = window_s / NUM_BINS
        self._counts = np.zeros(NUM_BINS)
        self._intensity_today = np.full(NUM_BINS, np.nan)
        self._profile: NDArray[np.float64] | None = None
        self._intensity_profile: NDArray[np.float64] | None = None
        self._rhythms = np.ones((1, NUM_BINS))
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

    def horizon(self, now_s: float, *, likely: tuple[float, float] | None = None) -> Horizon:
        """Return the forecast from `now_s` to the end of the window, or a little beyond.

        `likely` are bounds that a whole window's requests are not far from, if anything is known:
        they matter until a whole window has been seen.
        """
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
            usual = self._guess(now_s, likely)
        else:
            usual = self._profile * self._level(here, 1 - left_in_bin)
        surplus = self._surplus(here, 1 - left_in_bin, usual)
        passing = np.exp(-np.arange(num_bins) / _PASSING_BINS)
        requests = usual[bins] * (1 + surplus * passing) * shares
        per_window = float(usual.sum())
        return Horizon(
            seconds=window_left_s,
            beyond=float(requests[beyond].sum()) / max(per_window, 1e-9),
            requests=requests,
            intensity=self._relative(now_s, here, bins),
        )

    def _level(self, here: int, share_of_bin: float) -> float:
        """Return today's traffic relative to the profile's, drawn towards one early in the day."""
        assert self._profile is not None
        expected = self._profile[: here + 1].copy()
        expected[-1] *= share_of_bin
        counts = self._counts[: here + 1]
        prior = _LEVEL_PRIOR * self._profile.sum()
        total = max(float(expected.sum() + prior), 1e-9)
        level = float(counts.sum() + prior) / total
        for _ in range(_LEVEL_SWEEPS):
            # What is beyond a burst's share, and three standard deviations of a quiet bin, passes.
            usual = level * expected
            kept = np.minimum(counts, _BURST * usual + 3 * np.sqrt(usual) + 1)
            level = float(kept.sum() + prior) / total
        return level

    def _surplus(self, here: int, share_of_bin: float, usual: NDArray[np.float64]) -> float:
        """Return by which share this bin and the one before exceed what is usual for them."""
        expected = usual[here] * share_of_bin + (usual[here - 1] if here else 0.0)
        counted = self._counts[here] + (self._counts[here - 1] if here else 0.0)
        # As much again as is usual for a bin is taken to have been as usual.
        return float((counted - expected) / max(expected + usual[here], 1e-9))

    def _guess(self, now_s: float, likely: tuple[float, float] | None) -> NDArray[np.float64]:
        """Return the requests of a whole window's bins, before any window has been seen whole."""
        assert self._started_s is not None
        edges_s = np.arange(NUM_BINS + 1) * self._bin_s
        start_s = (now_s // self.window_s) * self.window_s
        until_s = max(now_s, self._started_s + _MIN_ELAPSED_S)
        seen_s = np.clip(edges_s, self._started_s - start_s, until_s - start_s)
        return guess_traffic(
            self._counts,
            seen=np.diff(seen_s) / self._bin_s,
            rhythms=self._rhythms,
            likely=likely,
        )

    def _relative(self, now_s: float, here: int, bins: NDArray[np.int_]) -> NDArray[np.float64]:
        """Return the grid's rhythm: the announced one, else the last days'.

        A day that is dirtier than this rhythm is taken to stay so.
        """
        profile = self._intensity_profile
        if self._announced is not None:
            times_s = now_s + self._bin_s * np.arange(NUM_BINS)
            announced = [self._announced(time_s) for time_s in times_s.tolist()]
            if all(announced):
                # Aligned with the bins: the one of `now_s` comes first.
                profile = np.roll(np.array(announced, dtype=np.float64), here)
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
        middles_s = window * self.window_s + (np.arange(NUM_BINS) + 0.5) * self._bin_s
        self._rhythms = daily_rhythms(middles_s / 86_400)
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
