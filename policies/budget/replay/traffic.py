"""When requests come: a day with a rhythm and bursts, and a grid with a rhythm of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAY_S = 86_400.0
_STEP_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Burst:
    """From `start_s` for `length_s` seconds, `factor` times the traffic."""

    start_s: float
    length_s: float
    factor: float


def simulate_arrivals(
    num_requests: int,
    *,
    rng: np.random.Generator,
    num_bursts: int = 6,
    bursts: tuple[Burst, ...] = (),
) -> NDArray[np.float64]:
    """Return the seconds of about `num_requests` arrivals of one day, ascending.

    An inhomogeneous Poisson process: quiet nights, two daily peaks (10 and 20 h), and `num_bursts`
    random bursts of 5 to 20 minutes at 2 to 6 times the traffic. `bursts` come on top of
    `num_requests`.
    """
    steps_s = np.arange(0, DAY_S, _STEP_S)
    hours = steps_s / 3600
    rate = 0.25 + np.exp(-(((hours - 10) / 3.0) ** 2)) + 0.8 * np.exp(-(((hours - 20) / 2.5) ** 2))
    for _ in range(num_bursts):
        start_s = rng.uniform(0, DAY_S)
        length_s = rng.uniform(300, 1200)
        rate[(steps_s >= start_s) & (steps_s < start_s + length_s)] *= rng.uniform(2, 6)
    rate *= num_requests / rate.sum()
    for burst in bursts:
        inside = (steps_s >= burst.start_s) & (steps_s < burst.start_s + burst.length_s)
        rate[inside] *= burst.factor
    counts = rng.poisson(rate)
    return np.sort(np.repeat(steps_s, counts) + rng.uniform(0, _STEP_S, size=int(counts.sum())))


def solar_day(mean_gco2e_per_kwh: float) -> tuple[tuple[float, float], ...]:
    """Return (hour, gCO2e per kWh) of a made-up grid: clean at midday, dirty in the evening.

    Between about half and 1.4 times the mean; hourly values.
    """
    shape = [
        1.0
        - 0.45 * math.exp(-(((hour - 13) / 3.0) ** 2))
        + 0.4 * math.exp(-(((hour - 20) / 2.0) ** 2))
        for hour in range(24)
    ]
    scale = mean_gco2e_per_kwh * 24 / sum(shape)
    return tuple((float(hour), scale * value) for hour, value in enumerate(shape))
