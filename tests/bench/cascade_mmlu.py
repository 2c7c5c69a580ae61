"""The threshold search on RouteLLM's MMLU answers: Mixtral first, GPT-4 when in doubt, cost 1 : 20.

    python -m tests.bench.cascade_mmlu [FOLDER]

The data set holds which answers were right and not their texts, so the only score is the router's
P(weak is right | query), out of fold. Half of the queries choose the thresholds, the other half
measures them. Compared at equal mean cost: random escalation, the router alone (weak or strong,
never both), the cascade (weak always, strong below the threshold) and the gated cascade.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from scipy.special import expit

from policies.cascade.answers import Floats
from policies.cascade.fit import cross_fit
from policies.cascade.frontier import StageTable, columns, search
from policies.encoders.ngrams import NGrams
from policies.importers.benchmarks import import_routellm_mmlu
from policies.outcomes import score_table

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "routing" / "RouteLLM" / "mmlu"
PLOT = Path(__file__).parents[2] / "docs" / "cascade" / "mmlu.png"
WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
COSTS = np.array([1.0, 20.0])
SEED = 0

Curve = dict[str, Floats]


def main(folder: Path = FOLDER) -> None:
    """Measure, print the table and one JSON line, and draw the plot."""
    outcomes = import_routellm_mmlu(folder)
    quality_QS = score_table(outcomes, (WEAK, STRONG)).scores_QM
    queries = [outcome.query for outcome in outcomes]
    rng = np.random.default_rng(SEED)
    design = NGrams(bits=14, num_dimensions=1, seed=SEED).fit(queries).matrix(queries)
    fold_Q = rng.permutation(len(queries)) % 5
    fit = cross_fit(design, quality_QS[:, 0], fold_Q, (3.0,))
    score_Q = expit(fit.slope * fit.logit_N + fit.offset)
    train_Q = rng.permutation(len(queries)) % 2 == 0
    curves = {
        "cascade": _learned(quality_QS, score_Q, train_Q, num_gates=0),
        "gated cascade": _learned(quality_QS, score_Q, train_Q, num_gates=60),
        "router alone": _routed(quality_QS[~train_Q], score_Q[~train_Q]),
    }
    weak, strong = quality_QS[~train_Q].mean(axis=0)
    figures = _table(curves, weak, strong, int((~train_Q).sum()))
    _draw(curves, weak, strong)
    print(json.dumps({"bench": "cascade_mmlu", "queries": len(queries), "seed": SEED, **figures}))


def _learned(quality_QS: Floats, score_Q: Floats, train_Q: Floats, *, num_gates: int) -> Curve:
    """Learn the frontier on one half and replay each of its points on the other."""

    def table(rows: Floats) -> StageTable:
        num_queries = int(rows.sum())
        return StageTable(
            names=("weak", "strong"),
            quality_QS=quality_QS[rows],
            cost_QS=np.tile(COSTS, (num_queries, 1)),
            prior_QS=np.stack([score_Q[rows], np.ones(num_queries)], axis=1),
            model_QS=np.tile(np.arange(2), (num_queries, 1)),
            answer_QS=np.tile(np.arange(2), (num_queries, 1)),
        )

    # Chains that end with the weak model throw the strong one's answer away.
    frontier = [
        point
        for point in search(table(train_Q), lambda s, e, r: score_Q[train_Q], num_gates=num_gates)
        if point.stages != ("strong", "weak")
    ]
    held_out = table(~train_Q)
    cost, accuracy = [], []
    for point in frontier:
        chain = tuple(("weak", "strong").index(name) for name in point.stages)
        stages = columns(held_out, lambda s, e, r: score_Q[~train_Q], chain, point.gates)
        accepted = np.ones(held_out.num_queries, bool)
        if len(stages) == 2:
            accepted = stages[0].score_Q >= point.thresholds[0]
        last = stages[-1]
        cost.append((stages[0].cost_Q + (~accepted) * last.cost_Q).mean())
        accuracy.append(np.where(accepted, stages[0].quality_Q, last.quality_Q).mean())
    return {"cost": np.array(cost), "accuracy": np.array(accuracy)}


def _routed(quality_QS: Floats, score_Q: Floats) -> Curve:
    """Send the queries that the weak model is least likely to get right to the strong one."""
    order = np.argsort(score_Q)
    gain = np.concatenate([[0.0], np.cumsum((quality_QS[:, 1] - quality_QS[:, 0])[order])])
    share = np.arange(len(order) + 1) / len(order)
    return {
        "cost": COSTS[0] + share * (COSTS[1] - COSTS[0]),
        "accuracy": quality_QS[:, 0].mean() + gain / len(order),
    }


def _at(curve: Curve, cost: float) -> float:
    """Return the accuracy of the best point that costs at most `cost`."""
    affordable = curve["cost"] <= cost + 1e-9
    return float(curve["accuracy"][affordable].max()) if affordable.any() else float("nan")


def _table(curves: dict[str, Curve], weak: float, strong: float, num: int) -> dict[str, object]:
    print(f"Held out: {num} queries; weak {weak:.2%} at cost 1, strong {strong:.2%} at cost 20.")
    print(f"{'cost':>5} {'random':>8} " + " ".join(f"{name:>14}" for name in curves))
    figures: dict[str, object] = {"weak": round(weak, 4), "strong": round(strong, 4)}
    for cost in (2, 4, 6, 8, 10, 12, 15, 18):
        random = weak + (strong - weak) * (cost - 1) / 19
        row = {name: _at(curve, cost) for name, curve in curves.items()}
        print(f"{cost:>5} {random:>8.2%} " + " ".join(f"{value:>14.2%}" for value in row.values()))
        figures[f"at_{cost}"] = {"random": round(random, 4)} | {
            name: round(value, 4) for name, value in row.items()
        }
    return figures


def _draw(curves: dict[str, Curve], weak: float, strong: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(COSTS, [weak, strong], "--", color="tab:gray", label="random")
    for name, curve in reversed(curves.items()):
        # The router alone lies under the gated cascade almost everywhere.
        wide = name == "router alone"
        axes.plot(
            curve["cost"],
            curve["accuracy"],
            linewidth=5 if wide else 1.2,
            alpha=0.3 if wide else 1,
            label=name,
        )
    axes.set(
        xlabel="mean cost per query (weak model = 1, strong = 20)",
        ylabel="held-out accuracy",
        title="RouteLLM MMLU: Mixtral 8x7B, then GPT-4",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
