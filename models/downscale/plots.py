"""The report's plots, drawn from its figures alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from policies.files import write_atomic
from policies.laws.downscaling import PostPruningLaw
from policies.laws.scaling import EnsembleLaw
from policies.pages import new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = Mapping[str, Any]
_COLOURS: Final = {
    "base": "#444444",
    "chunk": "#8fb8de",
    "routed": "#d1495b",
    "policy": "#00798c",
}


def draw_all(figures: Figures, folder: Path) -> list[Path]:
    """Write every plot that the figures allow as PNG into `folder`, and return them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Figures], Figure | None]] = {
        "quality-compute": _quality_compute,
        "accuracy": _accuracy,
        "loss": _loss,
        "fused-loss": _fused_loss,
        "fused-error": _fused_error,
        "mixture": _mixture,
        "post-pruning": _post_pruning,
    }
    written = []
    for name, draw in plots.items():
        figure = draw(figures)
        if figure is not None:
            file = folder / f"{name}.png"
            write_atomic(file, png(figure))
            written.append(file)
    return written


def _quality_compute(figures: Figures) -> Figure:
    figure, [ax] = new_figure(width=8.5, height=5.2)
    is_right = any("accuracy" in system for system in figures["systems"])
    key, scale = ("accuracy", 100) if is_right else ("loss", 1)
    systems = [s for s in figures["systems"] if not np.isnan(s[key]["value"])]
    labelled: dict[str, bool] = {}
    for system in systems:
        low, high = (scale * v for v in system[key]["interval_95"])
        value, x = scale * system[key]["value"], system["parameters"] / 1e6
        kind = system["kind"]
        ax.errorbar(
            x, value, yerr=[[max(0, value - low)], [max(0, high - value)]], fmt="o", capsize=3,
            color=_COLOURS[kind], label=None if labelled.get(kind) else kind,
            alpha=0.7 if kind == "chunk" else 1.0,
        )  # fmt: skip
        labelled[kind] = True
    _label_apart(ax, {
        s["name"]: (s["parameters"], scale * s[key]["value"])
        for s in systems if s["kind"] != "chunk"
    })  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.tick_params(axis="x", which="both", labelsize=8)
    ax.margins(x=0.3)
    ax.set_xlabel("parameters at work per token (millions)")
    ax.set_ylabel(
        "exact match, mean over domains (%)" if is_right
        else "held-out loss, mean over domains (nats per byte)"
    )  # fmt: skip
    ax.set_title("Quality against compute")
    figure.legend(loc="outside lower center", ncols=len(labelled), frameon=False)
    return figure


def _label_apart(ax: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside their points (parameters, value), pushed apart where they meet."""
    by_x: dict[float, list[str]] = defaultdict(list)
    for name, (parameters, _) in points.items():
        by_x[round(np.log10(parameters), 1)].append(name)
    bottom, top = ax.get_ylim()
    # A line of text is about a twenty-fifth of the plot; offsets are in points.
    line, points_per_unit = (top - bottom) / 25, 72 * 3.9 / (top - bottom)
    for group in by_x.values():
        last = -np.inf
        for name in sorted(group, key=lambda name: points[name][1]):
            parameters, value = points[name]
            last = max(value, last + line)
            ax.annotate(
                name, (parameters / 1e6, value),
                xytext=(9, (last - value) * points_per_unit), textcoords="offset points",
                fontsize=8, va="center",
            )  # fmt: skip


def _accuracy(figures: Figures) -> Figure | None:
    systems = [system for system in figures["systems"] if "accuracy" in system]
    if not systems:
        return None
    return _heat_map(
        {s["name"]: {d: 100 * f["exact_match"] for d, f in s["by_domain"].items()}
         for s in systems},
        [d for d in figures["domains"] if any(d in s["by_domain"] for s in systems)],
        title="Exact match on held-out questions (%)", form="{:.0f}", best=max,
    )  # fmt: skip


def _loss(figures: Figures) -> Figure:
    return _heat_map(
        figures["losses"], figures["domains"], title="Loss on held-out answers (nats per token)",
        form="{:.2f}", best=min,
    )  # fmt: skip


def _heat_map(
    rows: Mapping[str, Mapping[str, float]],
    columns: Sequence[str],
    *,
    title: str,
    form: str,
    best: Callable[[list[float]], float],
) -> Figure:
    figure, [ax] = new_figure(width=1.1 * len(columns) + 3.2, height=0.3 * len(rows) + 1.6)
    values = np.array([[row.get(c, np.nan) for c in columns] for row in rows.values()])
    shown = -values if best is min else values
    low, high = np.nanquantile(shown, [0.05, 1.0])
    ax.imshow(shown, aspect="auto", cmap="Blues", vmin=low - 0.1 * (high - low), vmax=high)
    ax.grid(visible=False)
    for (r, c), value in np.ndenumerate(values):
        if not np.isnan(value):
            dark = shown[r, c] > low + 0.6 * (high - low)
            strong = value == best([v for v in values[:, c] if not np.isnan(v)])
            ax.text(
                c, r, form.format(value), ha="center", va="center", fontsize=8,
                color="white" if dark else "black", fontweight="bold" if strong else "normal",
            )  # fmt: skip
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.set_yticks(range(len(rows)), list(rows), fontsize=8)
    ax.set_title(title)
    return figure


def _fused_loss(figures: Figures) -> Figure:
    return _curves(figures, "loss", "nats per answer token")


def _fused_error(figures: Figures) -> Figure | None:
    if not any(key.startswith("error/") for key in figures["fits"]["curves"]):
        return None
    return _curves(figures, "error", "share of wrong answers")


def _curves(figures: Figures, what: str, unit: str) -> Figure:
    figure, axes = new_figure(2, width=10.5)
    curves = figures["fits"]["curves"]
    for ax, weighting in zip(axes, ("uniform", "evidence"), strict=True):
        every = {d: curves.get(f"{what}/{weighting}/{d}") for d in figures["domains"]}
        known = {domain: curve for domain, curve in every.items() if curve}
        for curve in known.values():
            ax.plot(curve["num_members"], curve["losses"], lw=0.8, color="#aaaaaa")
        _name_ends(ax, known)
        curve = curves[f"{what}/{weighting}/all"]
        ax.plot(curve["num_members"], curve["losses"], "o", color=_COLOURS["policy"], label="mean")
        if curve["law"]:
            law, n = EnsembleLaw(**curve["law"]), np.linspace(1, curve["num_members"][-1], 100)
            label = f"{law.L0:.3g} − {law.b:.3g} + {law.b:.3g}/n^{law.a:.3g}"
            ax.plot(
                n, law.predict(n), color=_COLOURS["routed"],
                label=f"{label}\nR² = {curve['r2']:.4f}" if curve["r2"] is not None else label,
            )  # fmt: skip
        ax.set_title(f"weights: {weighting}")
        ax.set_xlabel("members fused, n (mean over all subsets)")
        ax.set_xticks(curve["num_members"])
        ax.set_xlim(right=curve["num_members"][-1] * 1.18)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel(unit)
    figure.suptitle(f"Fused {what} against the number of members")
    return figure


def _name_ends(ax: Axes, curves: Mapping[str, Mapping[str, Any]]) -> None:
    """Name each curve at its end, pushed apart where they meet."""
    low, high = ax.get_ylim()
    ends = sorted((float(curve["losses"][-1]), name) for name, curve in curves.items())
    x, last = next(iter(curves.values()))["num_members"][-1], -np.inf
    for value, name in ends:
        last = max(value, last + 0.035 * (high - low))
        ax.annotate(
            name, (x, last), xytext=(4, 0), textcoords="offset points", fontsize=7,
            color="#777777", va="center",
        )  # fmt: skip


def _mixture(figures: Figures) -> Figure | None:
    found = figures["fits"]["mixture"]
    if not found:
        return None
    figure, axes = new_figure(2, width=10, height=3.9)
    tokens = sorted({p["tokens"] for p in found["points"]})
    last = [p for p in found["points"] if p["tokens"] >= 0.95 * max(tokens)]
    for ax, kind in zip(axes, ("domain", "general"), strict=True):
        for domain in dict.fromkeys(p["domain"] for p in last):
            mine = sorted((p for p in last if p["domain"] == domain),
                          key=lambda p: float(p["general_share"]))  # fmt: skip
            ax.plot(
                [100 * p["general_share"] for p in mine], [p[f"{kind}_loss"] for p in mine],
                "o-", label=domain,
            )  # fmt: skip
        ax.axvline(100 * found["general_share"], color="#d1495b", ls="--", lw=1)
        r2 = found[kind]["r2"]
        ax.set_title(f"{kind} loss" + ("" if r2 is None else f" (D-CPT fit: R² = {r2:.3f})"))
        ax.set_xlabel("general share of the training tokens (%)")
        ax.legend(frameon=False)
    axes[0].set_ylabel("nats per answer token")
    figure.suptitle(
        f"Mixture after {max(tokens) / 1e3:.0f} k tokens; dashed: the share that was taken"
    )
    return figure


def _post_pruning(figures: Figures) -> Figure | None:
    found = figures["fits"]["pruning"]
    if not found:
        return None
    figure, [ax] = new_figure()
    law = PostPruningLaw(**found["law"])
    for share in sorted({p["kept_share"] for p in found["points"]}):
        mine = sorted((p for p in found["points"] if p["kept_share"] == share),
                      key=lambda p: int(p["tokens"]))  # fmt: skip
        [line] = ax.plot(
            [p["tokens"] / 1e3 for p in mine], [p["loss"] for p in mine], "o",
            label=f"{share:.1%} kept",
        )  # fmt: skip
        tokens = np.linspace(mine[0]["tokens"], mine[-1]["tokens"], 50)
        losses = law.predict(
            base_loss=np.full(50, mine[0]["base_loss"]),
            kept_share=np.full(50, share),
            base_billion_parameters=np.full(50, mine[0]["base_parameters"] / 1e9),
            billion_tokens=tokens / 1e9,
        )
        ax.plot(tokens / 1e3, losses, color=line.get_color(), lw=1)
    ax.axhline(found["points"][0]["base_loss"], color="#444444", ls=":", label="base")
    ax.set_xlabel("training tokens since the cut (thousands)")
    ax.set_ylabel("held-out loss (nats per answer token)")
    ax.set_title("Loss after pruning and training (points) and the P2 law (lines)")
    ax.legend(frameon=False, fontsize=8)
    return figure
