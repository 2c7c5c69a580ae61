"""Plots of what is compared: choices within the pipeline, and time per token against depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policies.pages import new_figure

Figures = Mapping[str, Any]
COLOURS = ("#d1495b", "#00798c", "#444444")


def draw(figures: Figures, folder: Path) -> None:
    """Write every plot that the figures allow as PNG into `folder`."""
    found = {name: _variants(figures, name) for name in ("selection", "pruning", "distillation")}
    for name, figure in {**found, "latency": _latency(figures)}.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=130)


def _variants(figures: Figures, comparison: str):
    rows = [row for row in figures["variants"] if row["comparison"] == comparison]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    if not domains:
        return None
    figure, axes = new_figure(len(domains), width=5.0 * len(domains), height=3.8)
    for ax, domain in zip(axes, domains, strict=True):
        mine = [row for row in rows if row["domain"] == domain]
        for variant, colour in zip(
            dict.fromkeys(row["variant"] for row in mine), COLOURS, strict=False
        ):
            for seed in {row["seed"] for row in mine}:
                line = [r for r in mine if (r["variant"], r["seed"]) == (variant, seed)]
                line.sort(key=lambda r: int(r["tokens"]))
                first = seed == min(r["seed"] for r in mine)
                shown = [r for r in line if r["tokens"] > 0]
                ax.plot(
                    [r["tokens"] / 1e3 for r in shown], [r["loss"] for r in shown], "o-",
                    color=colour, ms=3, lw=1, alpha=0.8, label=variant if first else None,
                )  # fmt: skip
        ax.set_title(domain)
        ax.set_xlabel("training tokens (thousands)")
        ax.legend(frameon=False)
    axes[0].set_ylabel("held-out loss (nats per answer token)")
    title = {"selection": "Examples chosen by BALD against as many by lot",
             "pruning": "Parts kept by activation against the spectrum of the weights",
             "distillation": "Distillation from the base against labels alone"}  # fmt: skip
    figure.suptitle(title[comparison])
    return figure


def _latency(figures: Figures):
    figure, [ax] = new_figure()
    for timing in figures["timings"]:
        same = timing["name"] not in {"base", "chunk"}
        ax.plot(
            timing["num_layers"], timing["ms_per_token"], "o" if same else "s",
            color=COLOURS[1] if same else COLOURS[0],
        )  # fmt: skip
        ax.annotate(
            timing["name"], (timing["num_layers"], timing["ms_per_token"]),
            xytext=(7, 0) if same else (-7, 0), textcoords="offset points", fontsize=8,
            ha="left" if same else "right", va="center",
        )  # fmt: skip
    ax.set_xlabel("layers (all but the base have the chunk's size; labels: layers x width)")
    ax.set_ylabel("milliseconds per token, alone")
    ax.set_ylim(bottom=0)
    ax.margins(x=0.12)
    ax.set_title("Time per token against depth")
    return figure
