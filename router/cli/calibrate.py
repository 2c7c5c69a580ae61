"""`shoal calibrate energy`: the model of CPU time by RAPL, and estimates beside measurements."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from router.cli.console import (
    ConfigOption,
    LedgerOption,
    SinceOption,
    UntilOption,
    finite,
    opened,
    read_period,
    refusing,
)
from router.ledger import LedgerError

if TYPE_CHECKING:
    from policies.footprint import Rates
    from router.energy import Meter
    from router.ledger.queries import Use

app = typer.Typer(help="Measure what is otherwise assumed.", no_args_is_help=True)


@app.callback()
def _calibrate() -> None:
    """Measure what is otherwise assumed."""


@app.command("energy")
def calibrate_energy(
    *,
    seconds: Annotated[
        float,
        typer.Option(min=0.1, max=3600, callback=finite, help="How long each load is held."),
    ] = 5.0,
    since: SinceOption = None,
    until: UntilOption = None,
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Measure this machine's vCPUs with RAPL, and compare LLMCarbon with what the ledger measured.

    Prints the lines that make the model of CPU time fit this machine, where it has RAPL counters.
    """
    from models.pool import load_pool
    from policies.footprint import CPU_TIME
    from policies.tables import text_table
    from router.config import load_args
    from router.energy import MeterError, RaplMeter
    from router.ledger.queries import uses

    try:
        meter = RaplMeter()
    except MeterError as error:
        typer.echo(
            f"Not calibrated: {error}. Where `carbon.meter` is always or cpu-time, a CPU's energy "
            f"is {CPU_TIME.name}: seconds of vCPUs at the power that carbon.hardware states, true "
            f"within {CPU_TIME.low:g} to {CPU_TIME.high:g} times."
        )
    else:
        typer.echo(calibration(measure(meter, os.cpu_count() or 1, seconds)))
    with refusing():
        args = load_args(config)
        pool = load_pool(args.pool)
        rates = args.carbon.rates(
            pool.facts(),
            {model.name: model.spec.engine for model in pool.models},
            gco2e_per_kwh=args.carbon.grid(pool.folder).at(time.time()).gco2e_per_kwh,
        )
        try:
            with opened(ledger, config) as database:
                found = uses(database, period=read_period(since, until))
        except LedgerError as error:
            typer.echo(f"Nothing to compare: {error}.")
            return
        lines = comparison_lines(found, rates)
        typer.echo("")
        typer.echo(
            text_table(lines, num_left=2)
            if len(lines) > 1
            else "Nothing to compare: no request in the ledger has an energy but LLMCarbon's."
        )


def measure(meter: Meter, num_vcpus: int, seconds: float) -> list[tuple[int, float]]:
    """Return watts at none, half and all of the vCPUs busy with products of matrices."""
    points = []
    for num_busy in sorted({0, num_vcpus // 2, num_vcpus}):
        with ExitStack() as stack:
            for _ in range(num_busy):
                busy = subprocess.Popen(
                    [sys.executable, "-c", _BUSY], env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                stack.callback(busy.wait)
                stack.callback(busy.kill)
            time.sleep(min(1.0, seconds))  # until all have begun
            began_s, began_wh = time.monotonic(), meter.read_wh()
            time.sleep(seconds)
            used_wh, took_s = meter.read_wh() - began_wh, time.monotonic() - began_s
        points.append((num_busy, used_wh * 3600 / took_s))
    return points


_BUSY = "import numpy as n; a = n.ones((256, 256), 'f')\nwhile True: a @ a"


def calibration(points: Sequence[tuple[int, float]]) -> str:
    """Fit watts = idle + busy vCPUs · w to the points by least squares, and say what to write."""
    import numpy as np

    busy, watts = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    per_vcpu, idle = np.polyfit(busy, watts, 1)
    worst = float(np.abs(idle + per_vcpu * busy - watts).max())
    num_vcpus = int(busy.max())
    return (
        f"RAPL: {', '.join(f'{w:.2f} W with {b} vCPUs busy' for b, w in points)}; a straight line "
        f"misses by {worst:.2f} W at most. Into the configuration:\n"
        f"carbon: {{meter: cpu-time, hardware: {{device: cpu, count: {num_vcpus}, "
        f"idle_w: {idle / num_vcpus:.3f}, power_w: {idle / num_vcpus + per_vcpu:.3f}}}}}"
    )


def comparison_lines(
    found: Mapping[tuple[str, str], Use], rates: Mapping[str, Rates]
) -> list[tuple[str, ...]]:
    """Return a table: joules per token by each other method, and as LLMCarbon estimates them."""
    lines: list[tuple[str, ...]] = [
        ("member", "method", "tokens", "J/token", "LLMCarbon J/token", "measured/estimated")
    ]
    for (name, method), use in sorted(found.items()):
        if name not in rates or method in ("", "unknown", rates[name].method) or not use.num_tokens:
            continue
        wh = rates[name].footprint(use.prompt_tokens, use.output_tokens).wh
        lines.append(
            (
                name,
                method,
                f"{use.num_tokens:,}",
                f"{use.wh * 3600 / use.num_tokens:.4g}",
                f"{wh * 3600 / use.num_tokens:.4g}",
                f"{use.wh / wh:.3g}" if wh else "-",
            )
        )
    return lines
