"""Linear heads, one per model, fitted to outcomes by one convex-in-practice objective.

With z = X·W + b, r̂ = σ(z) the predicted score of every model and s* the enhanced scores:

    loss = Σ_q KL(softmax(s*/τ) ‖ softmax(r̂/τ))  +  λ Σ_q Σ_m BCE(s*_qm, σ(z_qm))  +  ½·l2·|W|²

The first term is ZOOTER's (Lu et al. 2023, eq. 5): it looks only at differences among models and
says nothing where they tie. The second carries that missing signal (RouterDC, Chen et al. 2024,
names the weakness) and makes σ(z) a probability. Unknown scores take part in neither.

Shape legend: Q queries, F features, M models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from policies.routing.targets import distribution

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Hyperparameters of the loss; all are >= 0, `temperature` > 0.

    `tie_weight` is λ above. `l2` counts per query, so it does not change with the data's size.
    """

    temperature: float = 0.5
    tie_weight: float = 1.0
    l2: float = 1e-3
    max_iterations: int = 40


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Fitted heads: logits are X @ weights_FM + bias_M."""

    weights_FM: NDArray[np.float32]
    bias_M: NDArray[np.float32]

    def logits(self, X_QF: sp.csr_matrix) -> Floats:
        """Return every model's logit for every row."""
        return np.asarray(X_QF @ self.weights_FM, np.float64) + self.bias_M


def fit_heads(
    X_QF: sp.csr_matrix, scores_QM: Floats, objective: Objective, *, start_from: Heads | None = None
) -> Heads:
    """Minimise the loss by L-BFGS, from the models' mean scores or from `start_from`.

    `scores_QM` are in [0, 1], NaN where unknown; every column needs a known score.
    """
    num_queries, num_models = scores_QM.shape
    used = np.unique(X_QF.indices)
    # Columns that no query has would only slow the optimiser down.
    X = X_QF[:, used].tocsr()
    X_T = X.T.tocsr()
    known = ~np.isnan(scores_QM)
    targets = np.where(known, scores_QM, 0.0)
    wanted = distribution(scores_QM, temperature=objective.temperature)
    mean_M = targets.sum(0) / np.maximum(known.sum(0), 1)
    mean_M = np.clip(mean_M, 1e-3, 1 - 1e-3)
    start = np.zeros((len(used) + 1, num_models))
    start[-1] = np.log(mean_M / (1 - mean_M))
    if start_from is not None:
        start[:-1], start[-1] = start_from.weights_FM[used], start_from.bias_M

    def loss(flat: Floats) -> tuple[float, Floats]:
        parameters = flat.reshape(start.shape)
        W = parameters[:-1]
        z = X @ W.astype(np.float32) + parameters[-1]
        r = expit(z)
        got = distribution(np.where(known, r, np.nan), temperature=objective.temperature)
        divergence = np.sum(wanted * (np.log(wanted + 1e-12) - np.log(got + 1e-12)))
        surprise = np.sum((np.logaddexp(0, z) - targets * z)[known])
        gradient_z = (got - wanted) / objective.temperature * r * (1 - r)
        gradient_z += objective.tie_weight * np.where(known, r - targets, 0.0)
        gradient = np.empty_like(parameters)
        gradient[:-1] = X_T @ gradient_z.astype(np.float32) / num_queries + objective.l2 * W
        gradient[-1] = gradient_z.mean(0)
        total = (divergence + objective.tie_weight * surprise) / num_queries
        return total + objective.l2 / 2 * np.sum(W * W), gradient.ravel()

    result = minimize(
        loss,
        start.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": objective.max_iterations, "ftol": 1e-6, "maxcor": 8},
    )
    parameters = result.x.reshape(start.shape)
    weights = np.zeros((X_QF.shape[1], num_models), np.float32)
    weights[used] = parameters[:-1]
    return Heads(weights_FM=weights, bias_M=parameters[-1].astype(np.float32))
