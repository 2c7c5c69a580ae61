"""The three claims, Proposition 4.1 and the published laws, held against a pool's figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.downscale.chunks import BASE
from models.downscale.figures import ORACLE, Comparison, Floats, System
from models.downscale.report import percent
from models.downscale.stage import Run
from models.errors import RecipeError
from policies.laws.downscaling import RecoveryLaw, RuntimeLaw
from policies.laws.scaling import ensemble_margin, smallest_winning_ensemble
from policies.pages import Row, Table

Figures = Mapping[str, Any]


def claims(
    systems: Mapping[str, System],
    comparison: Comparison,
    *,
    routed: Sequence[str],
    fused: Sequence[str],
    references: Sequence[str],
    curve: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The three claims, each answered in numbers against each of `references`.

    (a) a routed chunk keeps at least 95% of the reference's accuracy (of texts: of its probability
    per byte, e^(-nats per byte)); (b) a fused ensemble beats
    it; (c) the fused loss falls with n as the fitted law says, R² at least 0.9. A claim holds if
    its figure meets the bound, and holds surely if the whole interval does.
    """
    found: list[dict[str, Any]] = []
    for reference in references:
        other_Q = systems[reference].score_Q
        for name in routed:
            kept = _ratio(comparison, systems[name].score_Q, other_Q)
            found.append(_claim("a", name, reference, kept, bound=0.95))
        for name in fused:
            gain = comparison.mean(systems[name].score_Q - other_Q)
            found.append(_claim("b", name, reference, gain, bound=0.0))
    r2 = curve.get("r2")
    falls = all(a > b for a, b in zip(curve["losses"], curve["losses"][1:], strict=False))
    holds = r2 is not None and r2 >= 0.9 and falls
    found.append(
        {"claim": "c", "system": "fused loss", "reference": "L(n) = L0 - b + b/n^a",
         "value": r2, "interval_95": None, "bound": 0.9, "holds": holds, "surely": holds}
    )  # fmt: skip
    return found


def _ratio(comparison: Comparison, score_Q: Floats, other_Q: Floats) -> dict[str, Any]:
    """The share of another system's accuracy that is kept."""
    return comparison.figure(
        lambda weights: (weights @ score_Q) / np.maximum(weights @ other_Q, 1e-12)
    )


def _claim(
    claim: str, system: str, reference: str, figure: Mapping[str, Any], *, bound: float
) -> dict[str, Any]:
    low = figure["interval_95"][0]
    strict = claim == "b"
    value = figure["value"]
    return {
        "claim": claim,
        "system": system,
        "reference": reference,
        **figure,
        "bound": bound,
        "holds": value > bound if strict else value >= bound,
        "surely": low > bound if strict else low >= bound,
    }


def proposition(
    curve: Mapping[str, Any],
    pruning: Mapping[str, Any] | None,
    *,
    base_parameters: int,
    base_loss: float,
) -> dict[str, Any]:
    """Proposition 4.1 with the pool's own constants, and whether the measured losses agree.

    a and b are the ensemble law's, γ and δ P2's; N0 counts billions, as in the paper.
    """
    num_members = curve["num_members"][-1]
    fused = curve["losses"][-1]
    found: dict[str, Any] = {
        "num_members": num_members,
        "base_loss": base_loss,
        "fused_loss": fused,
        "measured_fused_wins": fused <= base_loss,
        "predicted_fused_wins": None,
    }
    if curve["law"] is None or pruning is None:
        return found
    constants: dict[str, Any] = {
        "a": curve["law"]["a"],
        "b": curve["law"]["b"],
        "gamma": pruning["law"]["gamma"],
        "delta": pruning["law"]["delta"],
    }
    margin = ensemble_margin(num_members, base_parameters, **constants)
    predicted = bool(margin >= 0)
    return found | {
        "constants": constants,
        "margin": margin,
        "smallest_winning_ensemble": smallest_winning_ensemble(base_parameters, **constants),
        "predicted_fused_wins": predicted,
        "agrees": predicted == (fused <= base_loss),
    }


def compression(
    run: Run, systems: Mapping[str, System], timings: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the published compression laws say of such a cut, and what was measured.

    Without recovery training accuracy is P0^1.01 (1 + r)^-1.05 (Sengupta et al. 2025).
    """
    removed = 1 - systems[run.domains[0]].parameters / systems[BASE].parameters
    base = float(np.nanmean(systems[BASE].score_Q))
    routed = float(np.nanmean(systems[ORACLE].score_Q))
    alone = float(np.mean([np.nanmean(systems[domain].score_Q) for domain in run.domains]))
    by_name = {timing["name"]: timing["ms_per_token"] for timing in timings}
    billion = run.recipe.adapt.tokens / 1e9
    return {
        "removed_share": round(removed, 4),
        "base_accuracy": round(base, 4),
        "rows": [
            _row("accuracy, no recovery training", base**1.01 * (1 + removed) ** -1.05,
                 alone, "a chunk on all domains"),
            _row("accuracy, with recovery training",
                 RecoveryLaw.PUBLISHED.predict(base, removed, billion), alone,
                 "a chunk on all domains; tokens in billions"),
            _row("accuracy, with recovery training",
                 RecoveryLaw.PUBLISHED.predict(base, removed, billion), routed,
                 "each chunk on its own domain"),
            _row("times faster", RuntimeLaw.PUBLISHED.speedup(removed),
                 by_name["base"] / by_name["chunk"], "one token at a time, batch 1"),
        ],
    }  # fmt: skip


def _row(what: str, predicted: float, measured: float, on: str) -> dict[str, Any]:
    return {
        "what": what,
        "on": on,
        "predicted": round(predicted, 4),
        "measured": round(measured, 4),
        "relative_error": round(predicted / measured - 1, 4) if measured else None,
    }


def other_runs(files: Mapping[str, str], domain_Q: Sequence[str]) -> dict[str, System]:
    """The systems of other runs on the same questions, the shared base and single chunks aside."""
    found: dict[str, System] = {}
    for label, file in files.items():
        try:
            content = json.loads(Path(file).read_text())
            others = content["systems"]
        except (OSError, ValueError, KeyError) as error:
            raise RecipeError(f"--compare {label}: {file} holds no results: {error}") from None
        if content["question_domains"] != {
            d: list(domain_Q).count(d) for d in dict.fromkeys(domain_Q)
        }:
            raise RecipeError(f"--compare {label}: {file} was measured on other questions")
        for system in others:
            if system["kind"] != "chunk" and system["name"] != BASE:
                name = f"{label}: {system['name']}"
                found[name] = System(
                    name=name,
                    kind=system["kind"],
                    score_Q=np.array([float(right) for right in system["right"]]),
                    usd_Q=np.zeros(len(system["right"])),
                    parameters=system["parameters"],
                )
    return found


_CLAIMS = {
    "a": "one routed chunk keeps at least 95% of the accuracy",
    "b": "the fused ensemble beats it",
    "c": "fused loss falls with n as the law says, R² ≥ 0.9",
}


def claims_table(figures: Figures) -> Table:
    """The claims as rows of the report."""

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


def proposition_table(figures: Figures) -> Table:
    """Proposition 4.1 as rows of the report."""
    found = figures["proposition"]
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


def compression_table(figures: Figures) -> Table:
    """The compression laws as rows of the report."""
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
