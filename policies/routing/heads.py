"""Linear heads, one per model: what they learn from, how they are fitted, and what makes them sure.

Two fits share the work. With z = X·W + b, r̂ = σ(z) the predicted score of every model and s* the
enhanced scores (`enhance`), the *levels* minimise

    Σ_q KL(softmax(s*/τ) ‖ softmax(r̂/τ))  +  λ Σ_q Σ_m BCE(s*_qm, σ(z_qm))  +  ½·l2·|W|²

The first term is ZOOTER's (Lu et al. 2023, eq. 5): it looks only at differences among models and
says nothing where they tie. The second carries that missing signal (RouterDC, Chen et al. 2024,
names the weakness) and makes σ(z) a probability. Unknown scores take part in neither. They weigh a
query's difference by how uncertain the level is (the logistic's slope); squared loss does not, and
ranks queries of unseen tasks better. So the levels say how hard a query is, and *differences*, by
ridge regression, who is better at it. `Platt` makes their logits probabilities that mean what they
say.

Shape legend: Q queries, F features, M models, C columns (targets), U features that occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

Floats = NDArray[np.float64]

RIDGE_TOLERANCE = 1e-3
"""A column is solved when its residual is this small, relative to where it began."""

FIELD_RIDGE = 1.0
"""How much the weights are regularised that tell the field's queries from those outside."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Hyperparameters of the levels' loss; all are >= 0, `temperature` > 0.

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

    def logits(self, X_QF: sp.csr_matrix, share_Q: Floats | None = None) -> Floats:
        """Return every model's logit for every row, of which only a share counts (None: all)."""
        sums_QM = np.asarray(X_QF @ self.weights_FM, np.float64)
        return (sums_QM if share_Q is None else sums_QM * share_Q[:, None]) + self.bias_M


def fit_heads(
    X_QF: sp.csr_matrix,
    scores_QM: Floats,
    tags: Sequence[Sequence[str]],
    objective: Objective,
    *,
    beta: float,
    ridge: float,
) -> Heads:
    """Return heads with the mean over models of the levels, and the deviations of differences.

    `scores_QM` are in [0, 1], NaN where unknown; every column needs a known score. For `tags` and
    `beta` see `enhance`.
    """
    targets_QM = enhance(scores_QM, tags, beta=beta)
    differences = fit_differences(X_QF, targets_QM, ridge=ridge)
    levels = fit_levels(X_QF, targets_QM, objective, start_from=differences)
    return with_differences(levels, differences)


def enhance(scores_QM: Floats, tags: Sequence[Sequence[str]], *, beta: float) -> Floats:
    """Return β·s(q) + (1 - β)·mean over q's tags of the tag's mean score (Lu et al. 2023, §3.3).

    A noisy score (one sampled answer, right or wrong) is pulled towards what its kind of query
    usually gets. Unknown scores (NaN) stay unknown; a query without tags keeps its own scores.
    """
    known = ~np.isnan(scores_QM)
    values = np.where(known, scores_QM, 0.0)
    names = {tag: i for i, tag in enumerate(dict.fromkeys(t for row in tags for t in row))}
    belongs = np.zeros((len(scores_QM), len(names)))
    for q, row in enumerate(tags):
        for tag in row:
            belongs[q, names[tag]] = 1.0
    count_TM = belongs.T @ known
    mean_TM = np.divide(
        belongs.T @ values, count_TM, out=np.full(count_TM.shape, np.nan), where=count_TM > 0
    )
    num_tags_Q1 = belongs.sum(1, keepdims=True)
    prior_QM = belongs @ np.nan_to_num(mean_TM) / np.maximum(num_tags_Q1, 1)
    # A known score of q is itself in each of its tags' means, so those means are all known.
    enhanced = np.where(num_tags_Q1 > 0, beta * values + (1 - beta) * prior_QM, values)
    return np.where(known, enhanced, np.nan)


def distribution(scores_QM: Floats, *, temperature: float) -> Floats:
    """Return softmax(scores / temperature) over each row's known scores; 0 where unknown."""
    scaled = np.where(np.isnan(scores_QM), -np.inf, scores_QM / temperature)
    exponential = np.exp(scaled - scaled.max(1, keepdims=True))
    share: Floats = exponential / exponential.sum(1, keepdims=True)
    return share


def fit_levels(
    X_QF: sp.csr_matrix, scores_QM: Floats, objective: Objective, *, start_from: Heads | None = None
) -> Heads:
    """Minimise the levels' loss by L-BFGS, from the models' mean scores or from `start_from`."""
    num_queries, num_models = scores_QM.shape
    used = np.unique(X_QF.indices)
    # Columns that no query has would only slow the optimiser down.
    X = X_QF[:, used].tocsr()
    X_T = X.T.tocsr()
    known = ~np.isnan(scores_QM)
    targets = np.where(known, scores_QM, 0.0)
    wanted = distribution(scores_QM, temperature=objective.temperature)
    mean_M = np.clip(mean_scores(scores_QM), 1e-3, 1 - 1e-3)
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


def fit_differences(X_QF: sp.csr_matrix, scores_QM: Floats, *, ridge: float) -> Heads:
    """Regress every model's known scores (NaN where unknown), less their mean, on the features.

    Scores become logits by the logistic's slope at the overall mean score, the same for all
    models, so that differences keep their proportions.
    """
    mean_M, W_FM = regress(X_QF, scores_QM, ridge=ridge)
    slope = mean_M.mean() * (1 - mean_M.mean())
    return Heads(
        weights_FM=W_FM / np.float32(slope),
        bias_M=np.log(mean_M / (1 - mean_M)).astype(np.float32),
    )


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


def regress(
    X_QF: sp.csr_matrix, scores_QM: Floats, *, ridge: float
) -> tuple[Floats, NDArray[np.float32]]:
    """Return every model's mean score, and the weights [F, M] of its deviations."""
    mean_M = np.clip(mean_scores(scores_QM), 1e-3, 1 - 1e-3)
    known = ~np.isnan(scores_QM)
    W_FM = ridge_regression(
        X_QF, np.where(known, scores_QM - mean_M, 0.0), known.astype(np.float64), ridge=ridge
    )
    return mean_M, W_FM


def field_weights(X_QF: sp.csr_matrix, home_Q: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return weights [F] by which queries of the field score near 1, and others near -1.

    Both kinds weigh the same, however many there are of each; a query that has nothing in common
    with either scores 0.
    """
    share_Q = np.where(home_Q, home_Q.mean(), 1 - home_Q.mean())
    weights_Q1 = (0.5 / share_Q)[:, None]
    targets_Q1 = np.where(home_Q, 1.0, -1.0)[:, None]
    return ridge_regression(X_QF, targets_Q1, weights_Q1, ridge=FIELD_RIDGE)[:, 0]


def mean_scores(scores_QM: Floats) -> Floats:
    """Return every model's mean over its known scores."""
    known = ~np.isnan(scores_QM)
    mean_M: Floats = np.where(known, scores_QM, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return mean_M


def ridge_regression(
    X_QF: sp.csr_matrix, Y_QC: Floats, weights_QC: Floats, *, ridge: float, max_iterations: int = 40
) -> NDArray[np.float32]:
    """Return W [F, C] that minimises, column by column, Σ_q weight·(x_q·w - y_q)² + ridge·|w|².

    Conjugate gradients on the normal equations (Hestenes & Stiefel 1952); one pass over the matrix
    serves every column. Where a weight is 0 its target says nothing (and must not be NaN).
    """
    used = np.unique(X_QF.indices)
    X = X_QF[:, used].astype(np.float32).tocsr()
    X_T = X.T.tocsr()
    weights = weights_QC.astype(np.float32)
    W_UC = np.zeros((len(used), Y_QC.shape[1]), np.float32)
    residual = X_T @ (weights * Y_QC.astype(np.float32))
    direction = residual.copy()
    size_C = _squares(residual)
    enough_C = size_C * RIDGE_TOLERANCE**2
    for _ in range(max_iterations):
        open_C = size_C > enough_C
        if not open_C.any():
            break
        image = X_T @ (weights * (X @ direction)) + np.float32(ridge) * direction
        curvature_C = np.einsum("uc,uc->c", direction, image, dtype=np.float64)
        step_C = np.where(open_C, size_C / np.maximum(curvature_C, 1e-30), 0).astype(np.float32)
        W_UC += step_C * direction
        residual -= step_C * image
        new_C = _squares(residual)
        direction *= (new_C / np.maximum(size_C, 1e-30)).astype(np.float32)
        direction += residual
        size_C = np.where(open_C, new_C, size_C)
    W_FC = np.zeros((X_QF.shape[1], W_UC.shape[1]), np.float32)
    W_FC[used] = W_UC
    return W_FC


@dataclass(frozen=True, kw_only=True)
class Platt:
    """Scaling of logits, P = σ(slope·z + offset) (Platt 1999); fit it on held-out z.

    One pair for all models: a pair per model fits the noise of each and then ranks models by it
    (nine models, 381 queries: accuracy 0.57 instead of 0.62, for an ECE 0.01 lower).
    """

    slope: float
    offset: float

    def probabilities(self, logits_QM: Floats) -> Floats:
        """Return the calibrated probabilities."""
        scaled: Floats = expit(logits_QM * self.slope + self.offset)
        return scaled

    def scaled(self, heads: Heads) -> Heads:
        """Return heads whose logits are calibrated: it costs nothing, for it is affine in them."""
        slope = np.float32(self.slope)
        return Heads(
            weights_FM=heads.weights_FM * slope,
            bias_M=heads.bias_M * slope + np.float32(self.offset),
        )


def fit_platt(logits_QM: Floats, scores_QM: Floats) -> Platt:
    """Fit slope and offset by maximum likelihood with a weak pull towards the identity.

    Unknown scores (NaN) are left out.
    """
    known = ~np.isnan(scores_QM)
    z, y = logits_QM[known], scores_QM[known]

    def loss(parameters: Floats) -> tuple[float, Floats]:
        slope, offset = parameters
        scaled = slope * z + offset
        error = expit(scaled) - y
        pull = np.array([slope - 1, offset])
        value = np.sum(np.logaddexp(0, scaled) - y * scaled) + pull @ pull / 2
        return float(value), np.array([error @ z, error.sum()]) + pull

    # A negative slope would turn the ranking of queries upside down on noise alone.
    bounds = [(0.05, 5.0), (-5.0, 5.0)]
    result = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds)
    return Platt(slope=float(result.x[0]), offset=float(result.x[1]))


def _squares(columns: NDArray[np.float32]) -> Floats:
    squares_C: Floats = np.einsum("uc,uc->c", columns, columns, dtype=np.float64)
    return squares_C


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A reliability diagram: per bin of predictions, mean prediction, mean score, and count."""

    predicted: Floats
    observed: Floats
    count: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error: count-weighted mean |predicted - observed|."""
        gap = np.abs(self.predicted - self.observed)
        return float(np.sum(gap * self.count) / np.sum(self.count))


def reliability(predicted: Floats, observed: Floats, *, num_bins: int = 15) -> Reliability:
    """Bin predictions by equal counts (equal widths would leave most bins empty).

    Both arguments hold one number per prediction; pairs with an unknown score are left out.
    """
    known = ~np.isnan(observed)
    order = np.argsort(predicted[known], kind="stable")
    p, y = predicted[known][order], observed[known][order]
    bins = [b for b in np.array_split(np.arange(len(p)), num_bins) if len(b)]
    return Reliability(
        predicted=np.array([p[b].mean() for b in bins]),
        observed=np.array([y[b].mean() for b in bins]),
        count=np.array([float(len(b)) for b in bins]),
    )
