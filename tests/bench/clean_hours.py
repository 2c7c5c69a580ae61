"""What batch work saves by waiting for cleaner hours: a year of hours, against the offline optimum.

    python -m tests.bench.clean_hours [--seed 0] [--plot FILE] [--hourly FILE ...]

No hourly intensities ship with Shoal, nor with the tables that it is made from: there are yearly
means and yearly shares of sources (CodeCarbon's `global_energy_mix.json`). **Real** hours may be
given as `--hourly`: CSV files whose first column is "gco2e_per_kwh" or "kg_CO2/kWh", a line an
hour, as `carbon_intensity.csv` in the package CityLearn 2.0.0. Without them the year is
**synthetic**: real are each country's shares, the mean of its year and where the sun stands; made
up are clouds and wind (log-normal, AR(1) with a memory of one day and of 30 hours) and a demand
with two daily peaks, quieter weekends and a winter. Nuclear power and biomass run flat, what is
then missing comes from fossil fuels and water in the year's proportion.

Batches come at random moments, are due in 24 hours and take 2, 4 or 8 hours of work. The rule is
the server's (`policies.carbon.grid.may_wait`), asked every quarter of an hour, with three announced
years: the mean of each hour over the last four weeks (what anybody can write into a `grid_file`), a
day-ahead forecast (error 15% at 24 hours, growing with the square root of the time ahead), and the
truth. What is left of a batch seems up to a fifth shorter or longer than it is. The optimum takes
the cheapest quarters of an hour, in hindsight.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.carbon.grid import may_wait

MIX = (
    Path(__file__).parents[3]
    / "shared/data/carbon/codecarbon/codecarbon/data/private_infra/global_energy_mix.json"
)
# gCO2e per kWh: CodeCarbon's `carbon_intensity_per_source.json`; biomass as hydropower there.
SOURCES = {
    "coal": 995.0, "gas": 743.0, "oil": 816.0, "nuclear": 29.0, "hydroelectricity": 26.0,
    "biofuel": 26.0, "solar": 48.0, "wind": 26.0,
}  # fmt: skip
# Latitude in degrees, of where much of the country's sun is.
PLACES = {"DEU": 50.0, "ESP": 39.0, "GBR": 52.0, "POL": 52.0, "USA": 37.0, "FRA": 46.0}
STEP_S = 900.0
PER_DAY = 96
DAYS = 365
DUE = PER_DAY  # steps until a batch is due

Floats = NDArray[np.float64]


def year(country: str, *, seed: int) -> Floats:
    """Return a synthetic year's intensity per quarter of an hour, gCO2e per kWh."""
    mix: dict[str, Any] = json.loads(MIX.read_text())[country]
    rng = np.random.default_rng([seed, *country.encode()])
    total = sum(mix[f"{source}_TWh"] for source in SOURCES)
    share = {source: mix[f"{source}_TWh"] / total for source in SOURCES}
    steps = np.arange(DAYS * PER_DAY)
    hour, day = steps % PER_DAY / 4, steps / PER_DAY
    season = np.cos(2 * math.pi * (day - 15) / 365)
    demand = 1 + 0.10 * season + 0.10 * np.exp(-(((hour - 10) / 4) ** 2))
    demand += 0.14 * np.exp(-(((hour - 19) / 2.5) ** 2)) - 0.15 * (hour < 6)
    demand *= 1 - 0.08 * (steps // PER_DAY % 7 >= 5)
    demand /= demand.mean()
    latitude = math.radians(PLACES[country])
    tilt = np.radians(-23.44 * np.cos(2 * math.pi * (day + 10) / 365))
    height = np.sin(latitude) * np.sin(tilt) + np.cos(latitude) * np.cos(tilt) * np.cos(
        math.pi * (hour - 12) / 12
    )
    sun = np.maximum(height, 0) * np.exp(0.5 * _memory(rng, hours=24))
    wind = np.exp(0.7 * _memory(rng, hours=30)) * (1 + 0.25 * season)
    made = {
        "solar": sun * share["solar"] / sun.mean(),
        "wind": wind * share["wind"] / wind.mean(),
        **{source: np.full(len(steps), share[source]) for source in ("nuclear", "biofuel")},
    }
    # What nobody needs is not made.
    missing = np.maximum(demand - sum(made.values()), 0.02)
    rest = [s for s in SOURCES if s not in made]
    for source in rest:
        made[source] = missing * share[source] / sum(share[s] for s in rest)
    grams = sum(made[source] * SOURCES[source] for source in SOURCES)
    intensity: Floats = grams / sum(made.values())
    scaled: Floats = intensity * (mix["carbon_intensity"] / float(intensity.mean()))
    return scaled


def hourly(file: Path) -> Floats:
    """Return a file's intensity per quarter of an hour, gCO2e per kWh; gaps as the hour before."""
    with file.open(newline="") as lines:
        head, *rows = csv.reader(lines)
    grams = (
        np.array([float(row[0]) for row in rows])
        * {"kg_CO2/kWh": 1000, "gco2e_per_kwh": 1}[head[0]]
    )
    known = np.maximum.accumulate(np.where(grams > 0, np.arange(len(grams)), 0))
    return np.repeat(grams[known], PER_DAY // 24)


def _memory(rng: np.random.Generator, *, hours: float) -> Floats:
    """Return a stationary AR(1) of variance one that forgets in so many `hours`."""
    keep = math.exp(-1 / (4 * hours))
    noise = rng.normal(size=DAYS * PER_DAY) * math.sqrt(1 - keep**2)
    value, values = rng.normal(), []
    for step in noise.tolist():
        value = keep * value + step
        values.append(value)
    return np.array(values)


def rhythm(truth: Floats, now: int) -> Floats:
    """Return the next day as the mean of the last four weeks had it, hour by hour."""
    past = truth[: now // PER_DAY * PER_DAY][-28 * PER_DAY :].reshape(-1, 24, 4).mean(axis=(0, 2))
    at: NDArray[np.int_] = (now + np.arange(DUE + 1)) % PER_DAY // 4
    found: Floats = past[at]
    return found


def forecast(truth: Floats, now: int, *, error: float, rng: np.random.Generator) -> Floats:
    """Return the next day's quarters of an hour with an error that grows with the time ahead."""
    ahead = truth[now : now + DUE + 1]
    steps = rng.normal(size=len(ahead) - 1) * error / math.sqrt(PER_DAY)
    announced: Floats = ahead * np.exp(np.concatenate([[0.0], np.cumsum(steps)]))
    return announced


def work(
    truth: Floats, begin: int, num_steps: int, *, seems: float, announced: Callable[[int], Floats]
) -> tuple[float, bool]:
    """Return a batch's mean intensity by the server's rule, and whether it was late.

    What is left of it seems to take `seems` times as long as it does.
    """
    seen = announced(begin)
    done: list[float] = []
    for step in range(DUE):
        waits = may_wait(
            lambda then_s: float(seen[min(int(then_s // STEP_S), DUE)]),
            now_s=step * STEP_S,
            until_s=DUE * STEP_S,
            work_s=seems * (num_steps - len(done)) * STEP_S,
        )
        if not waits:
            done.append(truth[begin + step])
        if len(done) == num_steps:
            return float(np.mean(done)), False
    return float(np.mean([*done, *truth[begin + DUE : begin + DUE + num_steps - len(done)]])), True


def savings(truth: Floats, hours: int, *, num: int, seed: int) -> dict[str, float]:
    """Return, by what is announced, the share of carbon saved; and how many batches were late."""
    rng = np.random.default_rng([seed, hours])
    num_steps = hours * 4
    begins = rng.integers(29 * PER_DAY, len(truth) - 3 * PER_DAY, size=num).tolist()
    ways: dict[str, Callable[[int], Floats]] = {
        "rhythm": lambda now: rhythm(truth, now),
        "forecast": lambda now: forecast(truth, now, error=0.15, rng=rng),
        "truth": lambda now: truth[now : now + DUE + 1],
    }
    at_once, optimum, late = 0.0, 0.0, 0
    sums = dict.fromkeys(ways, 0.0)
    for begin in begins:
        seems = rng.uniform(0.8, 1.2)
        at_once += float(truth[begin : begin + num_steps].mean())
        optimum += float(np.sort(truth[begin : begin + DUE])[:num_steps].mean())
        for name, announced in ways.items():
            mean, is_late = work(truth, begin, num_steps, seems=seems, announced=announced)
            sums[name] += mean
            late += is_late
    return {
        **{name: 1 - total / at_once for name, total in sums.items()},
        "optimum": 1 - optimum / at_once,
        "late": late / (num * len(ways)),
    }


def main(num: int, seed: int, plot: Path | None, files: list[Path]) -> None:
    """Print what is saved per country and length of work, as Markdown."""
    print("| country, mean | work | rhythm | forecast | truth | optimum | late |")
    print("|---|---|---|---|---|---|---|")
    years = {file.parent.name: hourly(file) for file in files} or {
        country: year(country, seed=seed) for country in PLACES
    }
    for name, truth in years.items():
        for hours in (2, 4, 8):
            found = savings(truth, hours, num=num, seed=seed)
            told = " | ".join(f"{share:.1%}" for share in found.values())
            print(f"| {name}, {truth.mean():.0f} g/kWh | {hours} h | {told} |", flush=True)
    if plot is not None:
        draw(seed, plot)


def draw(seed: int, plot: Path) -> None:
    """Draw a week of June and one of December of each country, to be looked at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    for axes, (name, first) in zip(
        figure.subplots(2, 1), (("June", 160), ("December", 340)), strict=True
    ):
        for country in PLACES:
            week = year(country, seed=seed)[first * PER_DAY : (first + 7) * PER_DAY]
            axes.plot(np.arange(len(week)) / PER_DAY, week, label=country)
        axes.set(title=f"{name} (synthetic)", ylabel="gCO2e/kWh", xlabel="days", ylim=(0, None))
    axes.legend(ncols=6)
    figure.savefig(plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=300, help="batches per country and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--hourly", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    main(given.num, given.seed, given.plot, given.hourly)
