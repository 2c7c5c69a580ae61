"""`shoal costs` and `shoal calibrate energy`: what members cost, and how well that is known."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router.cli.console import (
    ConfigOption,
    LedgerOption,
    SinceOption,
    UntilOption,
    opened,
    read_period,
    refusing,
)

if TYPE_CHECKING:
    from models.pool import Pool
    from policies.carbon.economics import DeviceCosts
    from policies.footprint import Rates
    from router.config import AppArgs
    from router.energy import Meter

calibrate_app = typer.Typer(help="Measure what is otherwise assumed.", no_args_is_help=True)


@calibrate_app.callback()
def _calibrate() -> None:
    """Measure what is otherwise assumed."""


_AMOUNTS = ("busy_s", "wh", "wh_low", "wh_high", "usd")


@dataclass(kw_only=True)
class Use:
    """What one member used, in sums: tokens, seconds of a whole device, watt-hours and USD.

    `methods` and `prices` are the names by which that is known; the requests came from Unix time
    `first_s` to `last_s`.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    busy_s: float = 0.0
    wh: float = 0.0
    wh_low: float = 0.0
    wh_high: float = 0.0
    usd: float = 0.0
    methods: set[str] = field(default_factory=set)
    prices: set[str] = field(default_factory=set)
    first_s: float = float("inf")
    last_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.output_tokens

    def add(self, cost: Mapping[str, Any], tokens: Mapping[str, int]) -> None:
        """Add what one request says of the member."""
        self.prompt_tokens += tokens["prompt_tokens"]
        self.output_tokens += tokens["output_tokens"]
        for name in _AMOUNTS:
            setattr(self, name, getattr(self, name) + cost[name])
        self.methods |= {part for part in cost["method"].split("+") if part}
        self.prices.add(cost["price"])


def uses(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Use]:
    """Return what the ledger's `rows` say of each member, by its name and method."""
    found: dict[tuple[str, str], Use] = {}
    for row in rows:
        for name, tokens in (row["members"] or {}).items():
            cost = (row["costs"] or {}).get(name)
            if cost is not None:
                use = found.setdefault((name, cost["method"]), Use())
                use.add(cost, tokens)
                use.first_s = min(use.first_s, row["time_s"])
                use.last_s = max(use.last_s, row["time_s"] + row["latency_s"])
    return found


def together(parts: Iterable[Use]) -> Use:
    """Return several uses as one."""
    whole = Use()
    for part in parts:
        for name in ("prompt_tokens", "output_tokens", *_AMOUNTS):
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        whole.methods |= part.methods
        whole.prices |= part.prices
        whole.first_s = min(whole.first_s, part.first_s)
        whole.last_s = max(whole.last_s, part.last_s)
    return whole


def costs(
    *,
    hosted_input: Annotated[
        float | None,
        typer.Option(min=0, max=1e9, help="A hosted service's USD per million tokens read."),
    ] = None,
    hosted_output: Annotated[
        float | None,
        typer.Option(min=0, max=1e9, help="A hosted service's USD per million tokens written."),
    ] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    ledger: LedgerOption = None,
    config: ConfigOption = None,
) -> None:
    """Print what each member's tokens cost, what of it is capital, energy and idle time.

    From the seconds and the energy in the ledger, and the configuration's `economics`.
    """
    from models.pool import load_pool
    from policies.tables import text_table
    from router.config import load_args
    from router.ledger.queries import requests

    with refusing(), opened(ledger, config) as database:
        if (hosted_input is None) != (hosted_output is None):
            raise ValueError("--hosted-input and --hosted-output go together")
        args = load_args(config)
        pool = load_pool(args.pool)
        found = uses(requests(database, period=read_period(since, until)))
        by_member = {
            model.name: together(use for (name, _), use in found.items() if name == model.name)
            for model in pool.models
        }
        if not any(use.num_tokens for use in by_member.values()):
            typer.echo("No member of the pool answered anything in this ledger and period.")
            return
        typer.echo(text_table(cost_lines(args, pool, by_member), num_left=2))
        for line in load_lines(args, pool, by_member, hosted_input, hosted_output):
            typer.echo(line)


_HEAD = (
    *("member", "priced by", "tokens", "busy s", "USD/M tokens"),
    *("capital", "other", "idle", "energy", "J/token", "at least", "at most", "energy known by"),
)


def cost_lines(args: AppArgs, pool: Pool, by_member: Mapping[str, Use]) -> list[tuple[str, ...]]:
    """Return the table's lines, its head first: those members that ran."""
    from policies.carbon.economics import device_price

    lines: list[tuple[str, ...]] = [_HEAD]
    for name, use in by_member.items():
        if not use.num_tokens:
            continue
        engine = pool.model(name).spec.engine
        parts: dict[str, float] = {}
        device_costs = costs_of(args, pool, engine)
        if device_costs is not None:
            price = device_price(device_costs, args.carbon.device_of(engine), pue=args.carbon.pue)
            parts = {
                "capital": use.busy_s * price.capital_usd_per_s,
                "other": use.busy_s * price.other_usd_per_s,
                "idle": use.busy_s * price.idle_usd_per_s,
                "energy": use.wh * price.usd_per_wh,
            }
        usd = sum(parts.values()) if parts else use.usd
        lines.append(
            (
                name,
                "hardware" if parts else "+".join(sorted(use.prices)),
                f"{use.num_tokens:,}",
                f"{use.busy_s:.4g}",
                f"{usd / use.num_tokens * 1e6:.4g}",
                *(
                    f"{parts[part] / usd:.0%}" if parts and usd else "-"
                    for part in ("capital", "other", "idle", "energy")
                ),
                *(f"{wh * 3600 / use.num_tokens:.4g}" for wh in (use.wh, use.wh_low, use.wh_high)),
                "+".join(sorted(use.methods)) or "-",
            )
        )
    return lines


def costs_of(args: AppArgs, pool: Pool, engine: str) -> DeviceCosts | None:
    """Return what the device of `engine` costs; None where typed prices hold."""
    [spec] = [spec for spec in pool.engines if spec.name == engine]
    return args.economics.of(engine, remote=spec.kind == "remote") if args.economics else None


def load_lines(
    args: AppArgs,
    pool: Pool,
    by_member: Mapping[str, Use],
    hosted_input: float | None,
    hosted_output: float | None,
) -> list[str]:
    """Return a sentence per engine: its load, and the load at which it costs what others ask."""
    from policies.carbon.economics import break_even
    from policies.methods import method_of

    if args.economics is None:
        return [
            "Prices are those typed in the pool file. With `economics: {device_usd, utilisation, "
            "usd_per_kwh}` in the configuration they follow from the hardware."
        ]
    lines = []
    for spec in pool.engines:
        device_costs = costs_of(args, pool, spec.name)
        use = together(by_member[model.name] for model in pool.models_of(spec.name))
        if device_costs is None or not use.busy_s:
            continue
        span_s = max(use.last_s - use.first_s, use.busy_s)
        guessed = any(method_of(name).guesses_time for name in use.methods)
        lines.append(
            f"{spec.name}: one device would have been busy {use.busy_s / span_s:.2%} of the time "
            "from the first of these requests to the last; "
            f"{device_costs.utilisation:.0%} is planned."
            + (" Some of its seconds are guessed, not measured." if guessed else "")
        )
        if hosted_input is None or hosted_output is None:
            continue
        hosted_usd = (use.prompt_tokens * hosted_input + use.output_tokens * hosted_output) / 1e6
        even = break_even(
            device_costs,
            args.carbon.device_of(spec.name),
            pue=args.carbon.pue,
            num_tokens=use.num_tokens,
            busy_s=use.busy_s,
            wh=use.wh,
            hosted_usd=hosted_usd,
        )
        asked = f"The hosted price of the same tokens is {hosted_usd:.4g} USD"
        if even.utilisation is None:
            lines.append(f"  {asked}: less than their energy alone costs here, at any load.")
        elif even.utilisation > 1:
            lines.append(
                f"  {asked}: this device never gets there; it would have to be busy "
                f"{even.utilisation:.1f} times over ({even.tokens_per_s:,.0f} tokens/s)."
            )
        else:
            lines.append(
                f"  {asked}: even from a load of {even.tokens_per_s:,.1f} tokens/s on, "
                f"{even.utilisation:.1%} of the device's time."
            )
    return lines


@calibrate_app.command("energy")
def calibrate_energy(
    *,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=3600, help="How long each load is held.")
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
    from policies.methods import CPU_TIME
    from policies.tables import text_table
    from router.config import load_args
    from router.energy import MeterError, RaplMeter
    from router.ledger import LedgerError
    from router.ledger.queries import requests

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
                found = uses(requests(database, period=read_period(since, until)))
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
