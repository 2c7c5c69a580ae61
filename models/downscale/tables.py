"""The report's tables as plain rows of text, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]
Row = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A heading, what to know before reading, the column names and the rows."""

    title: str
    text: str
    columns: Row
    rows: tuple[Row, ...]


_CLAIMS = {
    "a": "one routed chunk keeps at least 95% of the accuracy",
    "b": "the fused ensemble beats it",
    "c": "fused loss falls with n as the law says, R² ≥ 0.9",
}


def all_tables(figures: Figures) -> list[Table]:
    """Every table that the figures allow, in the report's order."""
    tables = [_claims(figures), _systems(figures), _training(figures), _laws(figures)]
    tables += [_proposition(figures), _compression(figures), _selection(figures)]
    return [table for table in tables if table.rows]


def percent(figure: Mapping[str, Any], *, digits: int = 1) -> str:
    """A share with its interval."""
    low, high = (100 * value for value in figure["interval_95"])
    value = 100 * figure.get("value", figure.get("exact_match", 0))
    return f"{value:.{digits}f}% [{low:.{digits}f}, {high:.{digits}f}]"


def _claims(figures: Figures) -> Table:
    def rows() -> Iterator[Row]:
        for claim in sorted(figures["claims"], key=lambda claim: str(claim["claim"])):
            if claim["claim"] == "c":
                value = "no fit" if claim["value"] is None else f"R² = {claim['value']:.4f}"
            elif claim["claim"] == "a":
                value = percent(claim)
            else:
                low, high = (100 * v for v in claim["interval_95"])
                value = f"{100 * claim['value']:+.1f} points [{low:+.1f}, {high:+.1f}]"
            verdict = "yes" if claim["holds"] else "no"
            if claim["holds"] != claim["surely"]:
                verdict += ", within error"
            yield (
                f"({claim['claim']}) {_CLAIMS[claim['claim']]}",
                claim["system"],
                claim["reference"],
                value,
                verdict,
            )

    return Table(
        title="The three claims",
        text=(
            "95% intervals from a bootstrap over the test questions, within each domain, the same "
            f"resamples for both sides. {_tokens(figures)}"
        ),
        columns=("claim", "system", "against", "measured", "holds"),
        rows=tuple(rows()),
    )


def _tokens(figures: Figures) -> str:
    """How many tokens the chunks and the base's own further training had."""
    trained = {n: m["training"] for n, m in figures["models"].items() if "training" in m}
    chunks = sum(trained[d]["tokens"] for d in figures["domains"] if d in trained)
    text = f"The chunks were trained for {chunks / 1e6:.2f} M tokens together"
    if "finetuned" not in trained:
        return f"{text}."
    tokens = trained["finetuned"]["tokens"]
    equal = abs(tokens / chunks - 1) < 0.02 if chunks else False
    return f"{text}, “finetuned”, the base trained on, for {tokens / 1e6:.2f} M: " + (
        "equal parameters and equal tokens." if equal else "not the same number of tokens."
    )


def _systems(figures: Figures) -> Table:
    domains = figures["domains"]

    def rows() -> Iterator[Row]:
        for system in figures["systems"]:
            by_domain = system["by_domain"]
            yield (
                system["name"],
                f"{system['parameters'] / 1e6:.2f} M",
                percent(system["accuracy"]),
                *(
                    f"{100 * by_domain[d]['exact_match']:.1f}" if d in by_domain else "–"
                    for d in domains
                ),
            )

    return Table(
        title="Exact match",
        text=(
            f"Greedy answers to {figures['num_test_questions']:,} held-out test questions; the "
            "mean is over domains. “Parameters” are those at work on each token."
        ),
        columns=("system", "parameters", "mean", *domains),
        rows=tuple(rows()),
    )


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


def _proposition(figures: Figures) -> Table:
    found = figures["fits"]["proposition"]
    constants = found.get("constants")
    rows: list[Row] = [
        ("members n", str(found["num_members"])),
        ("base's loss, nats", f"{found['base_loss']:.4f}"),
        ("fused loss, nats", f"{found['fused_loss']:.4f}"),
        ("measured: the ensemble beats the base", _yes(found["measured_fused_wins"])),
    ]
    if constants:
        rows += [
            ("constants", ", ".join(f"{k} {v:.3g}" for k, v in constants.items())),
            ("left minus right side", f"{found['margin']:.4g}"),
            ("smallest n that wins", str(found["smallest_winning_ensemble"] or "none")),
            ("predicted: the ensemble beats the base", _yes(found["predicted_fused_wins"])),
            ("prediction and measurement agree", _yes(found["agrees"])),
        ]
    return Table(
        title="Proposition 4.1 with the pool's own constants",
        text=(
            "((n^a − 1)/n^(a+γ))·(n − 1)^γ ≥ 1/(b·N0^δ) (Sengupta et al. 2025, eq. 13), N0 in "
            "billions as in the paper; a and b from the fused loss with weights from evidence, "
            "γ and δ from P2."
        ),
        columns=("", ""),
        rows=tuple(rows),
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _compression(figures: Figures) -> Table:
    found = figures["compression"]

    def rows() -> Iterator[Row]:
        for row in found["rows"]:
            error = "–" if row["relative_error"] is None else f"{row['relative_error']:+.0%}"
            yield row["what"], row["on"], f"{row['predicted']:.3f}", f"{row['measured']:.3f}", error

    return Table(
        title="Compression laws",
        text=(
            f"What Sengupta et al. 2025 publish, fitted to models of 0.5B to 14B parameters and "
            f"ratios up to 0.9, predicts for a cut that removes {found['removed_share']:.1%} of a "
            f"base with accuracy {found['base_accuracy']:.3f}."
        ),
        columns=("figure", "on", "predicted", "measured", "error"),
        rows=tuple(rows()),
    )


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
