"""What to expect before anything is trained: `shoal plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from router.cli.console import finite, refusing

if TYPE_CHECKING:
    from policies.planning import PlanningReport


def plan(
    *,
    base_params: Annotated[
        float, typer.Option(min=1e3, max=1e15, help="Parameters of the base model, e.g. 8e9.")
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="Training budget: an amount and a unit (tokens per chunk, flops, kWh, MWh, "
            "gCO2e, kgCO2e, tCO2e, USD), e.g. 20e9tokens or 2tCO2e."
        ),
    ] = "20e9tokens",
    device: Annotated[str, typer.Option(help="Device of the shipped hardware table.")] = "h200",
    devices: Annotated[int, typer.Option(min=1, max=10**6, help="How many of them train.")] = 8,
    zone: Annotated[str, typer.Option(help="Grid zone: DE, WORLD, gcp:us-central1 ...")] = "WORLD",
    pue: Annotated[float, typer.Option(min=1, max=10, help="Power usage effectiveness.")] = 1.1,
    usd_per_device_hour: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Needed for a budget in USD.")
    ] = None,
    keep_share: Annotated[
        float, typer.Option(help="Share of the base's performance that pruning must keep.")
    ] = 0.9,
    laws: Annotated[
        Path | None, typer.Option(help="A pool's laws.npz; its constants replace published ones.")
    ] = None,
    general_loss_limit: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=finite,
            help="Highest general loss (nats per token) for the D-CPT ratio.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the answers to this PNG.")] = None,
) -> None:
    """Answer how many chunks of which size, at what loss and carbon, before any training."""
    from policies.carbon.grid import find_zone
    from policies.carbon.llmcarbon import find_device
    from policies.files import check_target
    from policies.laws.file import read_laws
    from policies.planning import Site, budget_flops, plan_training

    with refusing("plan"):
        if plot is not None:
            check_target(plot, option="--plot", suffix=".png")
        grid = find_zone(zone)
        site = Site(
            device=find_device(device),
            num_devices=devices,
            pue=pue,
            gco2e_per_kwh=grid.gco2e_per_kwh,
            usd_per_device_hour=usd_per_device_hour,
        )
        report = plan_training(
            base_parameters=base_params,
            flops=budget_flops(budget, base_parameters=base_params, site=site),
            site=site,
            sizes=(1, 2, 4, 6, 7, 8, 12, 16, 24, 32),
            kept_share=keep_share,
            laws=read_laws(laws) if laws else None,
            general_loss_limit=general_loss_limit,
        )
        print(planning_text(report, place=f"{devices} × {device}, {grid.name}, PUE {pue:g}"))
        if plot is not None:
            draw_planning(report, plot)
            print(f"\nPlot: {plot}")


_SIZES = ("chunks", "each", "loss of one", "loss of all", "eq. 13 margin")
_SHAPES = ("d_model", "layers", "R", "loss", "latency")


def planning_text(report: PlanningReport, *, place: str) -> str:
    """Return the report as text."""
    from policies.tables import text_table

    carbon = report.carbon
    sizes = [
        (
            str(row.num_chunks),
            _si(row.chunk_parameters),
            f"{row.chunk_loss:.4f}",
            f"{row.ensemble_loss:.4f}",
            "base" if row.margin is None else f"{row.margin:+.4f}",
        )
        for row in report.rows
    ]
    shapes = [
        (
            str(item.shape.d_model),
            str(item.shape.num_layers),
            f"{item.shape.aspect_ratio:.0f}",
            f"{item.loss:.4f}",
            f"{item.relative_latency:.2f}",
        )
        for item in report.shapes
    ]
    lines = [
        f"Base of {_si(report.base_parameters)} parameters; each chunk sees "
        f"{_si(report.tokens_per_chunk)} tokens.",
        f"Training, all chunks together ({place}): {carbon.days:.2f} days, {carbon.mwh:.3f} MWh, "
        f"{carbon.operational_tco2e:.3f} t CO2e operational + {carbon.embodied_tco2e:.3f} t "
        "embodied.",
        "",
        text_table([_SIZES, *sizes], num_left=0),
    ]
    winning = report.smallest_winning
    if winning is None:
        lines += ["", "No number of chunks beats the base by eq. 13."]
    else:
        each = _si(report.base_parameters / winning)
        lines += [
            "",
            f"The ensemble beats its base by eq. 13 from n = {winning} chunks of {each} "
            "parameters, counting N0 in billions; counting parameters it would be from "
            f"n = {report.smallest_winning_counting_parameters}. "
            "(For Llama-3-8B the paper's text says n > 7, its formula holds from 7.)",
        ]
    faster = f"{report.pruning_speedup:.2f} times faster"
    lines += [
        f"Pruning limit: to keep {report.kept_share:.0%} of the performance, remove at most "
        f"{report.pruning_limit:.1%} of the parameters ({faster}); "
        "beyond that no recovery data brings it back.",
        "Domain share (D-CPT): "
        + (
            f"at most {report.domain_share:.1%} of the training mixture."
            if report.domain_share is not None
            else f"not answered; {report.origins['domain share']}."
        ),
        "",
        f"Shapes of {_si(report.shape_parameters)} parameters:",
        text_table([_SHAPES, *shapes], num_left=0),
        "",
        "Where the constants come from:",
    ]
    lines += [f"  {name}: {origin}" for name, origin in report.origins.items()]
    return "\n".join(lines)


def draw_planning(report: PlanningReport, file: Path) -> None:
    """Draw losses, eq. 13's margin and the shapes to a PNG."""
    from policies.files import write_atomic
    from policies.pages import new_figure, png

    figure, [losses, margins, shapes] = new_figure(3, width=12, height=3.6)
    sizes = [row.num_chunks for row in report.rows]
    losses.plot(sizes, [row.chunk_loss for row in report.rows], "o-", label="one chunk")
    losses.plot(sizes, [row.ensemble_loss for row in report.rows], "s-", label="all fused")
    losses.set(xlabel="chunks", ylabel="predicted loss (nats/token)", title="Loss")
    losses.legend()
    several = [(row.num_chunks, row.margin) for row in report.rows if row.margin is not None]
    margins.plot([n for n, _ in several], [margin for _, margin in several], "o-")
    margins.axhline(0, color="black", linewidth=0.8)
    margins.set(xlabel="chunks", ylabel="left - right side", title="Eq. 13: beats its base above 0")
    shapes.plot(
        [item.relative_latency for item in report.shapes],
        [item.loss for item in report.shapes],
        "o",
    )
    for item in report.shapes:
        shapes.annotate(
            f"{item.shape.d_model}×{item.shape.num_layers}",
            (item.relative_latency, item.loss),
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=8,
        )
    shapes.margins(x=0.15, y=0.1)
    shapes.set(
        xlabel="latency relative to the deepest",
        ylabel="predicted loss (nats/token)",
        title=f"Shapes of {_si(report.shape_parameters)}",
    )
    write_atomic(file, png(figure))


def _si(value: float) -> str:
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
