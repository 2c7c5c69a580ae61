"""Training the scorer with scikit-learn, which is loaded here and not when serving.

Everything the threshold search sees is out of fold: each query's prior and scores come from
models that were fitted without it, and Platt's calibration is fitted on those scores.

Shape legend: Q queries, S stages, F dense signals, A n-gram features of an answer, N rows of a
design or answers, P falling signals, K thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy.optimize import lsq_linear
from scipy.sparse import csr_array, hstack, vstack
from scipy.special import expit

from policies.cascade.answers import AnswerTable, Floats, Ints, Predictions
from policies.cascade.scorer import (
    ANY_STAGE,
    DENSE_SIGNALS,
    NUM_OWN_SIGNALS,
    RANK_SIGNALS,
    THRESHOLDS_K,
    ScorerWeights,
    falling_signals,
    own_signals,
    rank_signals,
)
from policies.encoders.ngrams import NGrams
from policies.errors import PolicyError

Sparse: TypeAlias = Any  # scipy.sparse.csr_array; scipy's stubs leave its element type open

_NUM_FOLDS = 5
_PENALTIES = (0.5, 5.0)  # candidates for C, scikit-learn's inverse L2 strength
FALSE_STOPS = 0.01
"""Of the answers that reach a threshold, at most this share is stopped early."""


@dataclass(frozen=True, kw_only=True)
class FittedScorer:
    """The weights to serve, and out-of-fold predictions for the threshold search."""

    weights: ScorerWeights
    out_of_fold: Predictions


def fit_scorer(
    table: AnswerTable,
    *,
    seed: int = 0,
) -> FittedScorer:
    """Fit priors and scorers of every stage by cross-fitting; `PolicyError` for too few queries."""
    num_queries, num_stages = table.quality_QS.shape
    if num_queries < 2 * _NUM_FOLDS:
        raise PolicyError(
            f"the cascade's scorer needs at least {2 * _NUM_FOLDS} queries, got {num_queries}"
        )
    fold_Q = np.random.default_rng(seed).permutation(num_queries) % _NUM_FOLDS
    query_encoder = NGrams(bits=12, num_dimensions=1, seed=seed).fit(table.queries)
    query_QN = query_encoder.matrix(table.queries)
    priors = [cross_fit(query_QN, table.quality_QS[:, s], fold_Q) for s in range(num_stages)]
    pooled_prior = cross_fit(query_QN, table.quality_QS.mean(axis=1), fold_Q)
    every_answer = [answer for answers in table.answers for answer in answers]
    # Answers are short: windows of three characters tell a number from a date from a word.
    answer_encoder = NGrams(bits=8, window=3, num_dimensions=1, seed=seed).fit(every_answer)
    answer_QS = table.answer_ids()
    num_dense = len(DENSE_SIGNALS)
    rng = np.random.default_rng(seed)
    designs = [
        _design(table, s, expit(prior.logit_N), answer_QS, encoder=answer_encoder, rng=rng)
        for s, prior in enumerate(priors)
    ]
    models = [
        cross_fit(
            design,
            np.tile(table.quality_QS[:, s], 2),
            np.tile(fold_Q, 2),
            num_dense=num_dense,
        )
        for s, design in enumerate(designs)
    ]
    pooled = cross_fit(
        stack([design[:num_queries] for design in designs]),
        table.quality_QS.T.ravel(),
        np.tile(fold_Q, num_stages),
        num_dense=num_dense,
    )
    every = [*models, pooled]
    slopes = np.array([model.slope for model in every])
    raw_QS = np.stack(
        [model.slope * model.logit_N[:num_queries] + model.offset for model in models], axis=1
    )
    context_QS2 = np.stack(
        [model.slope * model.fold_weights[fold_Q, NUM_OWN_SIGNALS:num_dense] for model in models],
        axis=1,
    )
    prior_QS = np.stack([expit(prior.logit_N) for prior in priors], axis=1)
    stopping = _fit_stopping(table, prior_QS, raw_QS, context_QS2)
    weights = ScorerWeights(
        stages=(*table.plans, ANY_STAGE),
        query_encoder=query_encoder,
        answer_encoder=answer_encoder,
        prior_SN=np.stack([p.weights for p in (*priors, pooled_prior)]).astype(np.float32),
        prior_bias_S=np.array([p.bias for p in (*priors, pooled_prior)]),
        dense_SF=np.stack([model.weights[:num_dense] for model in every]),
        answer_SA=np.stack([model.weights[num_dense:] for model in every]).astype(np.float32),
        bias_S=np.array([model.bias for model in every]),
        slope_S=slopes,
        offset_S=np.array([model.offset for model in every]),
        rank_P=fit_ranker(table, expit(raw_QS), answer_QS),
        falling_SP=np.stack([weights_P for weights_P, _ in stopping]),
        cut_SK=np.stack([cut_K for _, cut_K in stopping]),
    )
    out_of_fold = Predictions(
        prior_QS=prior_QS, raw_QS=raw_QS, context_QS2=context_QS2, answer_QS=answer_QS
    )
    return FittedScorer(weights=weights, out_of_fold=out_of_fold)


def fit_ranker(table: AnswerTable, score_QS: Floats, answer_QS: Ints) -> Floats:
    """Return the weights of the pairwise ranker, fitted on pairs of answers of unequal quality.

    `score_QS` are out-of-fold scores. Each pair counts in both directions, so there is no bias.
    """
    num_queries, num_stages = score_QS.shape
    same_QSS = answer_QS[:, :, None] == answer_QS[:, None, :]
    support_QS = (same_QSS.sum(axis=2) - 1) / max(num_stages - 1, 1)
    signals_QSP = np.array(
        [
            [
                rank_signals(table.attempt(q, s), float(score_QS[q, s]), float(support_QS[q, s]))
                for s in range(num_stages)
            ]
            for q in range(num_queries)
        ]
    )
    better_QSS = table.quality_QS[:, :, None] > table.quality_QS[:, None, :]
    query_N, first_N, second_N = np.nonzero(better_QSS)
    difference_NP = signals_QSP[query_N, first_N] - signals_QSP[query_N, second_N]
    if not len(difference_NP):
        # Nothing to learn from: the better score wins.
        return np.array([1.0, *[0.0] * (len(RANK_SIGNALS) - 1)])
    scale_P = np.maximum(difference_NP.std(axis=0), 1e-9)
    rows = np.concatenate([difference_NP, -difference_NP]) / scale_P
    wins_N = np.repeat([1.0, 0.0], len(difference_NP))
    weights_P, _ = fit_logistic(csr_array(rows), wins_N, 1.0)
    result: Floats = weights_P / scale_P
    return result


def _fit_stopping(
    table: AnswerTable, prior_QS: Floats, raw_QS: Floats, context_QS2: Floats
) -> list[tuple[Floats, Floats]]:
    """Return each stage's early stopping, then that of all of them together."""
    num_queries, num_stages = raw_QS.shape
    falling_SQP = np.array(
        [
            [
                falling_signals(table.attempt(q, s), float(prior_QS[q, s]))
                for q in range(num_queries)
            ]
            for s in range(num_stages)
        ]
    )
    # Whatever the stages before it answered: the score is at most this.
    gain_QS = np.maximum(context_QS2[..., 0] + np.maximum(context_QS2[..., 1], 0.0), 0.0)
    most_SQ = (raw_QS + gain_QS).T
    own = [fit_stopping(falling_SQP[s], most_SQ[s]) for s in range(num_stages)]
    return [*own, fit_stopping(falling_SQP.reshape(-1, falling_SQP.shape[-1]), most_SQ.ravel())]


def _design(
    table: AnswerTable,
    stage: int,
    prior_Q: Floats,
    answer_QS: Ints,
    *,
    encoder: NGrams,
    rng: np.random.Generator,
) -> Sparse:
    """Return the features of one stage, [2Q, F + A]: alone, then after a random other stage."""
    num_queries, num_stages = answer_QS.shape
    own_QF = np.array(
        [own_signals(table.attempt(q, stage), float(prior_Q[q])) for q in range(num_queries)]
    )
    answer_QA = encoder.matrix(table.answers[stage])
    other_Q = (stage + rng.integers(1, max(num_stages, 2), num_queries)) % num_stages
    same_Q = answer_QS[np.arange(num_queries), other_Q] == answer_QS[:, stage]
    after = np.stack([np.ones(num_queries), same_Q.astype(float)], axis=1)
    blocks = [np.zeros((num_queries, 2)), after]
    own = csr_array(own_QF)
    return stack([hstack([own, csr_array(block), answer_QA]) for block in blocks])


def fit_stopping(falling_NP: Floats, logit_N: Floats) -> tuple[Floats, Floats]:
    """Return when a stage is hopeless: an estimate's weights [P], every threshold's cut [K].

    While an answer grows, the sum and the least of its log-probabilities can only fall, and with
    them any estimate that reads nothing else of the answer and rises with both. Such an estimate
    falls below a cut somewhere on the way exactly if it lies below it in the end. So how often it
    stops an answer that would have been accepted is counted on finished answers; no token-by-token
    records are needed. The cut of a threshold, ascending, is the split-conformal quantile (Vovk et
    al. 2005): of fresh answers like the training's whose score reaches the threshold, at most a
    share `FALSE_STOPS` lies below it.

    `falling_NP` are the answers' `falling_signals`; `logit_N` the logits of their out-of-fold
    scores, at the most that earlier stages' answers could make of them. The estimate is least
    squares, with no negative weight on what falls.
    """
    at_least_P = np.array([-np.inf, -np.inf, 0.0, 0.0])
    # The active sets of so few columns are exact, also where answers hardly differ in one.
    fit = lsq_linear(falling_NP, logit_N, bounds=(at_least_P, np.inf), method="bvls")
    weights_P: Floats = fit.x
    estimate_N = falling_NP @ weights_P
    threshold_logit_K = np.log(THRESHOLDS_K / (1 - THRESHOLDS_K))
    cut_K = np.array([_cut(estimate_N[logit_N >= least]) for least in threshold_logit_K])
    known = np.isfinite(cut_K)
    if not known.any():
        return weights_P, np.full(THRESHOLDS_K.size, -np.inf)
    # A lower threshold is never harder to reach; one that too few reach takes the last known cut.
    kept_K = np.minimum.accumulate(np.where(known, cut_K, np.inf)[::-1])[::-1]
    last = int(np.flatnonzero(known)[-1])
    kept_K[last:] = cut_K[last]
    return weights_P, kept_K


def _cut(estimate_n: Floats) -> float:
    """Return the conformal quantile of the answers that reach a threshold, NaN for too few."""
    rank = int(FALSE_STOPS * (estimate_n.size + 1))
    return float(np.partition(estimate_n, rank - 1)[rank - 1]) if rank else float("nan")


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
    *,
    num_dense: int = 0,
) -> CrossFit:
    """Fit logistic models in and out of fold, with the best of `_PENALTIES`, and calibrate.

    The lowest out-of-fold log loss wins. The first `num_dense` features are standardised, the
    others (n-gram vectors of unit length) are not: scaling rare buckets up would drown the rest.
    """
    best: CrossFit | None = None
    best_loss = np.inf
    scale = np.ones(design.shape[1])
    if num_dense:
        deviation = design[:, :num_dense].toarray().std(axis=0)
        scale[:num_dense] = np.where(deviation > 1e-9, deviation, 1.0)
    scaled = design.multiply(1 / scale).tocsr()
    for penalty in _PENALTIES:
        logit_N = np.empty(quality_N.size)
        fold_weights = []
        for fold in range(int(fold_N.max()) + 1):
            out = fold_N == fold
            weights, bias = fit_logistic(scaled[~out], quality_N[~out], penalty)
            logit_N[out] = scaled[out] @ weights + bias
            fold_weights.append(weights / scale)
        slope, offset = _platt(logit_N, quality_N)
        calibrated_N = slope * logit_N + offset
        loss = float(np.mean(np.logaddexp(0, calibrated_N) - quality_N * calibrated_N))
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


def stack(blocks: Sequence[Sparse]) -> Sparse:
    """Return sparse matrices one below the other."""
    return vstack(list(blocks)).tocsr()
