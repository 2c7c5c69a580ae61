"""`shoal costs`: what members cost, of what that consists, and at which load it pays."""

from __future__ import annotations

from collections.abc import Mapping
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

if TYPE_CHECKING:
    from models.pool import Pool
    from policies.carbon.economics import BreakEven, DeviceCosts
    from policies.carbon.llmcarbon import Device
    from router.config import AppArgs
    from router.ledger.queries import Use


def costs(
    *,
    hosted_input: Annotated[
        float | None,
        typer.Option(
            min=0, max=1e9, callback=finite, help="A hosted service's USD per million tokens read."
        ),
    ] = None,
    hosted_output: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e9,
            callback=finite,
            help="A hosted service's USD per million tokens written.",
        ),
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
    from router.ledger.queries import Use, uses

    with refusing():
        if (hosted_input is None) != (hosted_output is None):
            raise ValueError("--hosted-input and --hosted-output go together")
        args = load_args(config)
        pool = load_pool(args.pool)
        with opened(ledger, config) as database:
            found = uses(database, period=read_period(since, until))
        by_member = {
            model.name: Use.together(use for (name, _), use in found.items() if name == model.name)
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
                "hardware" if parts else use.price,
                f"{use.num_tokens:,}",
                f"{use.busy_s:.4g}",
                f"{usd / use.num_tokens * 1e6:.4g}",
                *(
                    f"{parts[part] / usd:.0%}" if parts and usd else "-"
                    for part in ("capital", "other", "idle", "energy")
                ),
                *(f"{wh * 3600 / use.num_tokens:.4g}" for wh in (use.wh, use.wh_low, use.wh_high)),
                use.method or "-",
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
    """Return a sentence per engine: its load, and the load at which it costs what others ask.

    And one of engines together whose devices are alike: they may share one.
    """
    from policies.carbon.economics import break_even, device_price
    from policies.footprint import method_of
    from router.ledger.queries import Use

    if args.economics is None:
        return [
            "Prices are those typed in the pool file. With `economics: {device_usd, utilisation, "
            "usd_per_kwh}` in the configuration they follow from the hardware."
        ]
    engines = {
        spec.name: Use.together(by_member[model.name] for model in pool.models_of(spec.name))
        for spec in pool.engines
    }
    alike: dict[object, tuple[DeviceCosts, Device, list[str]]] = {}
    for name, use in engines.items():
        device_costs, device = costs_of(args, pool, name), args.carbon.device_of(name)
        if device_costs is not None and use.busy_s:
            price = device_price(device_costs, device, pue=args.carbon.pue)
            alike.setdefault((price, device), (device_costs, device, []))[2].append(name)
    lines = []
    for device_costs, device, names in alike.values():
        # Engines may have such a device each, as replicas have, or be together on one.
        groups = [[name] for name in names] + ([names] if len(names) > 1 else [])
        for group in groups:
            use = Use.together(engines[name] for name in group)
            span_s = max(use.last_s - use.first_s, use.busy_s)
            guessed = any(method_of(name).guesses_time for name in use.method.split("+") if name)
            lines.append(
                f"{', '.join(group)}: one device would have been busy {use.busy_s / span_s:.2%} of "
                "the time from the first of these requests to the last; "
                f"{device_costs.utilisation:.0%} is planned."
                + (" Some of its seconds are guessed, not measured." if guessed else "")
            )
            if hosted_input is None or hosted_output is None:
                continue
            hosted_usd = (
                use.prompt_tokens * hosted_input + use.output_tokens * hosted_output
            ) / 1e6
            even = break_even(
                device_costs,
                device,
                pue=args.carbon.pue,
                num_tokens=use.num_tokens,
                busy_s=use.busy_s,
                wh=use.wh,
                hosted_usd=hosted_usd,
            )
            lines.append(
                f"  The hosted price of the same tokens is {hosted_usd:.4g} USD: {told(even)}"
            )
    return lines


def told(even: BreakEven) -> str:
    """Return in words where a device costs what the hosted service asks."""
    if even.utilisation is None or even.tokens_per_s is None:
        return "less than their energy alone costs here, at any load."
    if even.utilisation > 1:
        return (
            "this device never gets there; it would have to be busy "
            f"{even.utilisation:.3g} times over ({even.tokens_per_s:,.0f} tokens/s)."
        )
    return (
        f"even from a load of {even.tokens_per_s:,.1f} tokens/s on, "
        f"{even.utilisation:.1%} of the device's time."
    )
