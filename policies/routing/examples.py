"""Outcomes as training examples: what every way of training a router starts from.

Shape legend: Q queries, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.errors import PolicyError
from policies.outcomes import Outcome, score_table
from policies.routing.calibration import reliability

Floats = NDArray[np.float64]

MIN_QUERIES = 20


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Outcomes with at least one score, and their scores (NaN where unknown)."""

    models: tuple[str, ...]
    outcomes: Sequence[Outcome]
    scores_QM: Floats

    @property
    def texts(self) -> list[str]:
        """The queries."""
        return [outcome.query for outcome in self.outcomes]

    def tags(self, clusters_Q: NDArray[np.int64]) -> list[tuple[str, ...]]:
        """Return the queries' tags; their cluster where there are none."""
        return [
            outcome.tags or (f"cluster {cluster}",)
            for outcome, cluster in zip(self.outcomes, clusters_Q, strict=True)
        ]

    def held_out(self, share: float, seed: int) -> NDArray[np.bool_]:
        """Return which queries calibrate and measure, instead of training."""
        held_out_Q = np.zeros(len(self.outcomes), np.bool_)
        order = np.random.default_rng(seed).permutation(len(self.outcomes))
        held_out_Q[order[: round(share * len(self.outcomes))]] = True
        return held_out_Q

    def mean_output_tokens(self) -> NDArray[np.float32]:
        """Return the models' mean answer lengths, NaN where unknown."""
        nan = float("nan")
        tokens_QM = np.array(
            [[o.output_tokens.get(name, nan) for name in self.models] for o in self.outcomes]
        )
        known = ~np.isnan(tokens_QM)
        total, count = np.where(known, tokens_QM, 0).sum(0), known.sum(0)
        return np.where(count > 0, total / np.maximum(count, 1), nan).astype(np.float32)


def make_examples(outcomes: Sequence[Outcome], models: Sequence[str] | None = None) -> Examples:
    """Return the examples for `models` (default: all that have scores).

    Raises `PolicyError` for too few outcomes and `OutcomesError` for a model without scores.
    """
    if len(outcomes) < MIN_QUERIES:
        raise PolicyError(f"{len(outcomes)} outcomes are too few to train on; give {MIN_QUERIES}")
    table = score_table(outcomes, models)
    scored: NDArray[np.bool_] = ~np.all(np.isnan(table.scores_QM), axis=1)
    return Examples(
        models=table.models,
        outcomes=list(compress(outcomes, scored)),
        scores_QM=table.scores_QM[scored],
    )


def held_out_metrics(quality_QM: Floats, scores_QM: Floats) -> dict[str, Any]:
    """Return what choosing the best predicted model scores, beside its references.

    The accuracies count queries whose scores are all known; they are None if there are none.
    """
    known = ~np.isnan(scores_QM).any(1)
    quality, scores = quality_QM[known], scores_QM[known]
    metrics: dict[str, Any] = {
        "ece": round(reliability(quality_QM.ravel(), scores_QM.ravel()).ece, 4),
        "num_complete_queries": int(known.sum()),
        "accuracy": None,
        "best_single": None,
        "oracle": None,
    }
    if known.any():
        chosen = np.take_along_axis(scores, quality.argmax(1)[:, None], 1)
        metrics["accuracy"] = round(float(chosen.mean()), 4)
        metrics["best_single"] = round(float(scores.mean(0).max()), 4)
        metrics["oracle"] = round(float(scores.max(1).mean()), 4)
    return metrics
