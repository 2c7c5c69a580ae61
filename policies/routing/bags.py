"""How far a router's prediction depends on which queries it happened to learn from.

Several ridge regressions, each on a bootstrap sample of the training queries (bagging, Breiman
1996). Where their predictions for a query lie far apart, the data say little about it. This sees
what the distance to clusters cannot: a query in familiar words whose answerer is unclear.

Shape legend: Q queries, F features, B bags, M models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from policies.routing.differences import mean_scores
from policies.routing.ridge import ridge_regression

Floats = NDArray[np.float32]

LEAST_SPREAD = 0.05
"""A standard deviation of the predicted score that is never a reason to doubt."""


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Linear deviations of each bag's predicted score from the bags' mean.

    A query is in doubt where the spread, the bags' standard deviation for the chosen model, is
    above `usual_up_to`.
    """

    weights_FBM: Floats
    bias_BM: Floats
    usual_up_to: float

    def spreads(self, X_QF: sp.csr_matrix) -> Floats:
        """Return the spread of every query and model, [Q, M]."""
        num_bags, num_models = self.bias_BM.shape
        flat = np.asarray(X_QF @ self.weights_FBM.reshape(len(self.weights_FBM), -1))
        deviations_QBM = flat.reshape(-1, num_bags, num_models) + self.bias_BM
        spread_QM: Floats = np.sqrt(np.mean(deviations_QBM**2, axis=1))
        return spread_QM


def fit_bags(
    X_QF: sp.csr_matrix,
    scores_QM: NDArray[np.float64],
    *,
    num_bags: int,
    ridge: float,
    seed: int,
) -> Bags:
    """Fit the bags; nothing is in doubt before `with_usual_spread` has seen unseen queries."""
    num_queries, num_models = scores_QM.shape
    rng = np.random.default_rng(seed)
    times_QB = rng.multinomial(num_queries, np.full(num_queries, 1 / num_queries), num_bags).T
    known = ~np.isnan(scores_QM)
    weights_QBM = times_QB[:, :, None] * known[:, None, :]
    mean_M = mean_scores(scores_QM)
    gap_QM = np.where(known, scores_QM - mean_M, 0.0)
    # Each bag has its own mean too; models that a small bag misses keep the mean of all.
    bias_BM = np.einsum("qbm,qm->bm", weights_QBM, gap_QM) / np.maximum(weights_QBM.sum(0), 1)
    W_FC = ridge_regression(
        X_QF,
        (gap_QM[:, None, :] - bias_BM).reshape(num_queries, -1),
        weights_QBM.reshape(num_queries, -1).astype(np.float64),
        ridge=ridge,
        max_iterations=15,  # spreads need no more digits than that
    )
    W_FBM = W_FC.reshape(-1, num_bags, num_models)
    return Bags(
        # As precise as they are stored.
        weights_FBM=(W_FBM - W_FBM.mean(1, keepdims=True)).astype(np.float16).astype(np.float32),
        bias_BM=(bias_BM - bias_BM.mean(0)).astype(np.float32),
        usual_up_to=float("inf"),
    )


def with_usual_spread(
    bags: Bags, X_QF: sp.csr_matrix, chosen_Q: NDArray[np.intp], *, doubtful_share: float
) -> Bags:
    """Return `bags` that doubt at most `doubtful_share` of these queries, unseen by them.

    `chosen_Q` is the model whose prediction counts.
    """
    spread_Q = np.take_along_axis(bags.spreads(X_QF), chosen_Q[:, None], 1)[:, 0]
    usual = float(np.quantile(spread_Q, 1 - doubtful_share)) if len(spread_Q) else float("inf")
    usual *= 1.001  # queries that look the same differ by rounding
    return Bags(
        weights_FBM=bags.weights_FBM,
        bias_BM=bags.bias_BM,
        usual_up_to=max(usual, LEAST_SPREAD),
    )
