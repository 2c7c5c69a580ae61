"""What sets models apart on a query: ridge regression on each model's scores.

The distilled heads weigh a query's difference by how uncertain the level is (the logistic's slope);
squared loss does not, and ranks queries of unseen tasks better. So the heads say how hard a query
is, and these weights who is better at it.

Shape legend: Q queries, F features, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from policies.routing.heads import Heads
from policies.routing.ridge import ridge_regression

Floats = NDArray[np.float64]


def least_squares_heads(X_QF: sp.csr_matrix, scores_QM: Floats, *, ridge: float) -> Heads:
    """Regress every model's known scores (NaN where unknown), less their mean, on the features.

    Scores become logits by the logistic's slope at the overall mean score, the same for all
    models, so that differences keep their proportions.
    """
    mean_M, W_FM = _regress(X_QF, scores_QM, ridge)
    slope = mean_M.mean() * (1 - mean_M.mean())
    return Heads(
        weights_FM=W_FM / np.float32(slope),
        bias_M=np.log(mean_M / (1 - mean_M)).astype(np.float32),
    )


def best_ridge(
    seen_QF: sp.csr_matrix,
    seen_QM: Floats,
    unseen_QF: sp.csr_matrix,
    unseen_QM: Floats,
    *,
    ridges: Sequence[float],
) -> float:
    """Return which of `ridges`, fitted on seen queries, best predicts unseen ones.

    Judged by the squared error of what routing decides by: each model's score less the mean of the
    query's known scores. Models that each know their own field want little regularisation, ones
    that differ by luck want much.
    """
    known = ~np.isnan(unseen_QM)

    def error(ridge: float) -> float:
        mean_M, W_FM = _regress(seen_QF, seen_QM, ridge)
        wrong_QM = np.where(known, mean_M + unseen_QF @ W_FM - unseen_QM, 0.0)
        wrong_QM -= known * (wrong_QM.sum(1) / np.maximum(known.sum(1), 1))[:, None]
        return float((wrong_QM**2).sum())

    if len(ridges) == 1:
        return ridges[0]
    with ThreadPoolExecutor(2) as pool:  # sparse products let other threads run
        errors = dict(zip(ridges, pool.map(error, ridges), strict=True))
    return min(ridges, key=errors.__getitem__)


def _regress(
    X_QF: sp.csr_matrix, scores_QM: Floats, ridge: float
) -> tuple[Floats, NDArray[np.float32]]:
    """Return every model's mean score and the weights of its deviations."""
    mean_M = np.clip(mean_scores(scores_QM), 1e-3, 1 - 1e-3)
    known = ~np.isnan(scores_QM)
    W_FM = ridge_regression(
        X_QF, np.where(known, scores_QM - mean_M, 0.0), known.astype(np.float64), ridge=ridge
    )
    return mean_M, W_FM


def with_differences(levels: Heads, differences: Heads) -> Heads:
    """Return heads with the mean over models of `levels`, and the deviations of `differences`."""

    def swapped(own: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
        mixed: NDArray[np.float32] = other - other.mean(-1, keepdims=True)
        mixed += own.mean(-1, keepdims=True)
        return mixed

    return Heads(
        weights_FM=swapped(levels.weights_FM, differences.weights_FM),
        bias_M=swapped(levels.bias_M, differences.bias_M),
    )


def mean_scores(scores_QM: Floats) -> Floats:
    """Return every model's mean over its known scores."""
    known = ~np.isnan(scores_QM)
    mean_M: Floats = np.where(known, scores_QM, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return mean_M
