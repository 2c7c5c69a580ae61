"""What sets models apart on a query: ridge regression on each model's scores.

The distilled heads weigh a query's difference by how uncertain the level is (the logistic's slope);
squared loss does not, and ranks queries of unseen tasks better. So the heads say how hard a query
is, and these weights who is better at it.

Shape legend: Q queries, F features, M models.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import lsqr

from policies.routing.heads import Heads

Floats = NDArray[np.float64]


def with_differences(
    heads: Heads, X_QF: sp.csr_matrix, scores_QM: Floats, *, ridge: float
) -> Heads:
    """Return `heads` with their mean over models, and differences among models by least squares.

    Minimises |X·w - (s - mean)|² + ridge·|w|² for every model over its known scores (NaN where
    unknown), by LSQR (Paige & Saunders 1982), and brings the deviations from the mean over models
    to logits by the logistic's slope at the overall mean score.
    """
    known = ~np.isnan(scores_QM)
    mean_M = np.where(known, scores_QM, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    mean_M = np.clip(mean_M, 1e-3, 1 - 1e-3)
    solved = [
        lsqr(
            X_QF if known[:, m].all() else X_QF[known[:, m]],
            scores_QM[known[:, m], m] - mean_M[m],
            damp=ridge**0.5,
            iter_lim=30,
            atol=1e-3,
            btol=1e-3,
        )[0]
        for m in range(len(mean_M))
    ]
    W_FM = np.stack(solved, axis=1)
    mean = mean_M.mean()
    logit_M = np.log(mean_M / (1 - mean_M))
    weights_FM = (W_FM - W_FM.mean(1, keepdims=True)) / (mean * (1 - mean))
    weights_FM += heads.weights_FM.mean(1, keepdims=True)
    return Heads(
        weights_FM=weights_FM.astype(np.float32),
        bias_M=(logit_M - logit_M.mean() + heads.bias_M.mean()).astype(np.float32),
    )
