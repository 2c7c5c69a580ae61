"""The report: its tables, for HTML and Markdown alike, and `report.html`, one self-contained page
that needs no network, with its plots as PNG beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from models.downscale.plots import draw_all
from policies.pages import Row, Table, page

REPORT_FILE: Final = "report.html"
PLOTS_FOLDER: Final = "plots"

Figures = Mapping[str, Any]


def write_report(figures: Mapping[str, Any], folder: Path) -> None:
    """Draw the plots into `folder/plots` and write `folder/report.html` with them inside."""
    plots = draw_all(figures, folder / PLOTS_FOLDER)
    (folder / REPORT_FILE).write_text(render(figures, plots))


def render(figures: Mapping[str, Any], plots: Sequence[Path]) -> str:
    """The page."""
    title = f"Pool {figures['pool']}: from one base to {len(figures['domains'])} chunks"
    first, *others = all_tables(figures)
    return page(title, [first, *plots, *others])


def all_tables(figures: Figures) -> list[Table]:
    """Every table that the figures allow, in the report's order."""
    tables = [
        _right(figures),
        _held_out_losses(figures),
        _training(figures),
        _laws(figures),
        _selection(figures),
    ]
    return [table for table in tables if table.rows]


def percent(figure: Mapping[str, Any]) -> str:
    """A share with its interval."""
    low, high = (100 * value for value in figure["interval_95"])
    value = 100 * figure.get("value", figure.get("exact_match", 0))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def _right(figures: Figures) -> Table:
    systems = [system for system in figures["systems"] if "accuracy" in system]
    domains = [d for d in figures["domains"] if any(d in one["by_domain"] for one in systems)]
    rows = tuple(
        (
            *_size_and_price(system),
            percent(system["accuracy"]),
            *(
                f"{100 * system['by_domain'][d]['exact_match']:.1f}"
                if d in system["by_domain"]
                else "–"
                for d in domains
            ),
        )
        for system in systems
    )
    return Table(
        title="Exact match",
        text=(
            f"Greedy answers to {_num_asked(figures, domains):,} held-out test questions, by the "
            f"engine that serves; the mean is over domains, {_INTERVALS}"
        ),
        columns=("system", "parameters", "USD / 1,000", "mean", *domains),
        rows=rows,
    )


def _held_out_losses(figures: Figures) -> Table:
    systems = [system for system in figures["systems"] if "loss" in system]
    domains = list(systems[0]["loss_by_domain"]) if systems else []
    rows = tuple(
        (
            *_size_and_price(system),
            _with_interval(system["loss"]),
            *(f"{system['loss_by_domain'][d]:.4f}" for d in domains),
        )
        for system in systems
    )
    return Table(
        title="Held-out loss",
        text=(
            f"Nats per byte of how {_num_asked(figures, domains):,} pieces of held-out test texts "
            "go on from their middle; a policy's are those of whose answer it would give. The mean "
            f"is over domains, {_INTERVALS}"
        ),
        columns=("system", "parameters", "USD / 1,000", "mean", *domains),
        rows=rows,
    )


_INTERVALS: Final = (
    "with 95% intervals from a bootstrap. “Parameters” are those at work on each token; the "
    "policies auto, cascade, fused and best-of decide for each question which models that are. "
    "Prices are the pool file's examples."
)


def _size_and_price(system: Mapping[str, Any]) -> Row:
    return (
        system["name"],
        f"{system['parameters'] / 1e6:.2f} M",
        f"{system['usd_per_1000']:.5f}",
    )


def _with_interval(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval_95"]
    return f"{figure['value']:.4f} [{low:.4f}, {high:.4f}]"


def _num_asked(figures: Figures, domains: Sequence[str]) -> int:
    return sum(figures["question_domains"][domain] for domain in domains)


def _training(figures: Figures) -> Table:
    def rows() -> Iterator[Row]:
        for name, model in figures["models"].items():
            training = model.get("training")
            if training is None:
                continue
            footprint = model["footprint"]
            yield (
                name,
                model["lineage"],
                f"{model['parameters']:,}",
                f"{training['tokens'] / 1e6:.2f} M",
                f"{training.get('general_share', 0):.1%}",
                f"{training['losses'][-1][1]:.4f}" if training["losses"] else "–",
                f"{footprint['wh']:.3f}",
                f"{footprint['operational_gco2e'] + footprint['embodied_gco2e']:.3f}",
            )

    found = tuple(rows())
    methods = {m["footprint"]["method"] for m in figures["models"].values() if "footprint" in m}
    return Table(
        title="Training",
        text=f"Energy and carbon: {'; '.join(sorted(methods))}.",
        columns=(
            "model",
            "lineage",
            "parameters",
            "tokens",
            "general",
            "training loss (nats)",
            "Wh",
            "gCO2e",
        ),
        rows=found,
    )


def _laws(figures: Figures) -> Table:
    def rows() -> Iterator[Row]:
        for name, curve in figures["fits"]["curves"].items():
            if curve["law"] is None:
                continue
            r2 = "–" if curve["r2"] is None else f"{curve['r2']:.4f}"
            yield ("ensemble L(n)", name, _constants(curve["law"], curve["intervals"]), r2)
        pruning = figures["fits"]["pruning"]
        if pruning:
            yield ("P2", "loss after a cut", _constants(pruning["law"], _pairs(pruning)), "–")
        mixture = figures["fits"]["mixture"]
        for kind in ("domain", "general") if mixture else ():
            law = mixture[kind]
            r2 = "–" if law["r2"] is None else f"{law['r2']:.4f}"
            yield ("D-CPT", f"{kind} loss", _constants(law["law"], _pairs(law)), r2)

    return Table(
        title="Fitted laws",
        text=(
            "Constants with 95% residual-bootstrap intervals. The ensemble law is fitted to the "
            "mean over all subsets of each size; the name says what is fused (loss in nats or the "
            "share of wrong answers), with which weights, on which domain. With one size of base, "
            "P2's δ, α and Nc, and D-CPT's A and α, cannot be told apart; their predictions can."
        ),
        columns=("law", "of", "constants", "R²"),
        rows=tuple(rows()),
    )


def _pairs(fitted: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    return {name: (one["low"], one["high"]) for name, one in fitted["intervals"].items()}


def _constants(law: Mapping[str, float], intervals: Mapping[str, Any] | None) -> str:
    parts = []
    for name, value in law.items():
        low, high = (intervals or {}).get(name, (None, None))
        bounds = "" if low is None else f" [{low:.3g}, {high:.3g}]"
        parts.append(f"{name} {value:.3g}{bounds}")
    return ", ".join(parts)


def _selection(figures: Figures) -> Table:
    def rows() -> Iterator[Row]:
        for row in figures["selection"]:
            trials = ", ".join(f"{k} {v:.4f}" for k, v in row["trials"].items())
            kept = f"{row['kept']:,} of {row['of']:,}"
            yield row["domain"], kept, row["switch"] or "by lot", trials or "–"

    return Table(
        title="Selected examples",
        text=(
            "Scored by the uncertainty of an ensemble of members; which end is kept was decided "
            "by the held-out loss of two short trials where both are given."
        ),
        columns=("domain", "kept", "which", "trials (nats)"),
        rows=tuple(rows()),
    )
