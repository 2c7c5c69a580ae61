"""Cross-fitted, calibrated logistic models: scikit-learn, loaded only when training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy.sparse import csr_array, vstack

from policies.cascade.chains import Floats, Ints

Sparse: TypeAlias = Any  # scipy.sparse.csr_array; scipy's stubs leave its element type open


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """A logistic model on all rows, its folds' weights, and what the folds said out of fold.

    The calibrated logit is slope · logit + offset (Platt's scaling).
    """

    weights: Floats
    bias: float
    fold_weights: Floats  # [folds, features]
    logit_N: Floats
    slope: float
    offset: float


def cross_fit(
    design: Sparse,
    quality_N: Floats,
    fold_N: Ints,
    penalties: Sequence[float],
    *,
    num_dense: int = 0,
) -> CrossFit:
    """Fit logistic models in and out of fold, with the best of `penalties`, and calibrate.

    `penalties` are candidates for C, scikit-learn's inverse L2 strength; the lowest out-of-fold
    log loss wins. The first `num_dense` features are standardised, the others (n-gram vectors of
    unit length) are not: scaling rare buckets up would drown the rest.
    """
    best: CrossFit | None = None
    best_loss = np.inf
    scale = np.ones(design.shape[1])
    if num_dense:
        deviation = design[:, :num_dense].toarray().std(axis=0)
        scale[:num_dense] = np.where(deviation > 1e-9, deviation, 1.0)
    scaled = design.multiply(1 / scale).tocsr()
    for penalty in penalties:
        logit_N = np.empty(quality_N.size)
        fold_weights = []
        for fold in range(int(fold_N.max()) + 1):
            out = fold_N == fold
            weights, bias = fit_logistic(scaled[~out], quality_N[~out], penalty)
            logit_N[out] = scaled[out] @ weights + bias
            fold_weights.append(weights / scale)
        slope, offset = _platt(logit_N, quality_N)
        loss = _log_loss(slope * logit_N + offset, quality_N)
        if loss < best_loss:
            weights, bias = fit_logistic(scaled, quality_N, penalty)
            best_loss = loss
            best = CrossFit(
                weights=weights / scale,
                bias=bias,
                fold_weights=np.stack(fold_weights),
                logit_N=logit_N,
                slope=slope,
                offset=offset,
            )
    assert best is not None
    return best


def fit_logistic(design: Sparse, quality_N: Floats, penalty: float) -> tuple[Floats, float]:
    """Return weights and bias; soft labels become a weighted row of each class."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - training only
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - training only

    mean = float(np.clip(quality_N.mean(), 0.5 / quality_N.size, 1 - 0.5 / quality_N.size))
    hard = np.isin(quality_N, (0.0, 1.0)).all()
    if hard and np.unique(quality_N).size < 2:
        return np.zeros(design.shape[1]), float(np.log(mean / (1 - mean)))
    model = LogisticRegression(C=penalty, max_iter=5000, tol=1e-3)
    # More BLAS threads than one only spin on problems of this size.
    with threadpool_limits(1, user_api="blas"):
        if hard:
            model.fit(design, quality_N > 0.5)
        else:
            labels = np.repeat([False, True], quality_N.size)
            share = np.concatenate([1 - quality_N, quality_N])
            model.fit(stack([design, design]), labels, sample_weight=share)
    return model.coef_[0].astype(np.float64), float(model.intercept_[0])


def _platt(logit_N: Floats, quality_N: Floats) -> tuple[float, float]:
    """Fit sigmoid(slope · logit + offset), the slope kept >= 0 so that the order stays."""
    weights, offset = fit_logistic(csr_array(logit_N[:, None]), quality_N, 1e3)
    slope = max(float(weights[0]), 0.0)
    if slope == 0.0:
        mean = float(np.clip(quality_N.mean(), 0.5 / quality_N.size, 1 - 0.5 / quality_N.size))
        offset = float(np.log(mean / (1 - mean)))
    return slope, offset


def sigmoid(logit: Floats) -> Floats:
    """Return 1 / (1 + exp(-logit)), without overflow."""
    result: Floats = 0.5 * (1 + np.tanh(0.5 * logit))
    return result


def _log_loss(logit_N: Floats, quality_N: Floats) -> float:
    return float(np.mean(np.logaddexp(0, logit_N) - quality_N * logit_N))


def stack(blocks: Sequence[Sparse]) -> Sparse:
    """Return sparse matrices one below the other."""
    return vstack(list(blocks)).tocsr()
