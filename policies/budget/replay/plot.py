"""Draws a replayed day: traffic and grid, spending, price and quality by the hour."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from policies.budget.replay.replay import CONTROLLER, OPTIMUM, Replayed


def draw(replayed: Replayed, file: Path) -> None:
    """Write a PNG with four panels to `file`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - heavy
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    traffic, spending, price, quality = figure.subplots(4, 1, sharex=True)
    hours = np.arange(24)

    traffic.bar(hours, replayed.requests_H, color="lightgrey")
    traffic.set(ylabel="requests per hour")
    grid = traffic.twinx()
    grid.step(hours, replayed.intensity_H, where="mid", color="tab:brown")
    grid.set_ylabel("grid, gCO2e/kWh", color="tab:brown")

    unit = replayed.target.resource
    for result in replayed.results:
        spending.plot(
            hours,
            result.spent_H.cumsum() / replayed.budget,
            label=result.name,
            linestyle="--" if result.name == OPTIMUM else "-",
            linewidth=2 if result.name == CONTROLLER else 1,
        )
    spending.axhline(1, color="black", linewidth=0.8)
    spending.set(ylabel=f"{unit} spent / day's budget")
    spending.legend(fontsize=8)

    prices = replayed.of(CONTROLLER).price_H
    assert prices is not None
    price.step(hours, prices, where="mid", color="tab:orange")
    price.set(ylabel=f"controller's price\n(quality per {unit})", ylim=(0, None))

    for result in replayed.results:
        if result.name in (OPTIMUM, CONTROLLER):
            quality.plot(
                hours,
                result.quality_H,
                label=result.name,
                linestyle="--" if result.name == OPTIMUM else "-",
            )
    quality.set(ylabel="actual quality", xlabel="hour of the day (UTC)")
    quality.legend(fontsize=8)
    figure.savefig(file, dpi=120)
