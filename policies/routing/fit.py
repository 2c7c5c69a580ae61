"""Trains a router on outcomes.

The heads are fitted twice: on a part of the data, to calibrate and measure on the rest, so that
probabilities and metrics are those of new queries; then on all of it.

Shape legend: Q queries, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from policies.encoders.base import Encoder
from policies.errors import PolicyError
from policies.outcomes import Outcome, content_sha256, score_table
from policies.routing.calibration import fit_platt, reliability
from policies.routing.differences import with_differences
from policies.routing.heads import Heads, Objective, fit_heads
from policies.routing.router import Router
from policies.routing.targets import enhance
from policies.routing.topics import fit_topics

Floats = NDArray[np.float64]

MIN_QUERIES = 20


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a router is trained.

    `beta` is ZOOTER's share of a query's own score in its target, the rest being its tags' (or
    cluster's) mean; the paper uses 0.3 on noisy reward-model scores, exact scores bear more.
    `ridge` regularises what sets models apart (see `differences`).
    `unfamiliar_share` of queries like the training's are treated as unlike it.
    """

    objective: Objective = field(default_factory=Objective)
    beta: float = 0.7
    ridge: float = 10.0
    num_clusters: int = 32
    unfamiliar_share: float = 0.005
    held_out_share: float = 0.25
    seed: int = 0


def fit_router(
    outcomes: Sequence[Outcome],
    *,
    encoder: Encoder,
    models: Sequence[str] | None = None,
    settings: FitSettings | None = None,
) -> Router:
    """Fit the encoder, the heads, their calibration and the clusters.

    `models` (default: all that have scores) are the members to route between. Raises
    `PolicyError` for too few outcomes and `OutcomesError` for a model without scores.
    """
    settings = settings or FitSettings()
    if len(outcomes) < MIN_QUERIES:
        raise PolicyError(f"{len(outcomes)} outcomes are too few to train on; give {MIN_QUERIES}")
    table = score_table(outcomes, models)
    scores_QM = table.scores_QM
    scored: NDArray[np.bool_] = ~np.all(np.isnan(scores_QM), axis=1)
    outcomes, scores_QM = list(compress(outcomes, scored)), scores_QM[scored]
    texts = [outcome.query for outcome in outcomes]
    encoder = encoder.fit(texts)
    X_QF = encoder.matrix(texts)
    embeddings_QD = encoder.embeddings(X_QF)
    topics = fit_topics(
        embeddings_QD,
        scores_QM,
        num_clusters=settings.num_clusters,
        unfamiliar_share=settings.unfamiliar_share,
        seed=settings.seed,
    )
    clusters = topics.assign(embeddings_QD)
    tags = [
        outcome.tags or (f"cluster {cluster}",)
        for outcome, cluster in zip(outcomes, clusters, strict=True)
    ]
    held_out_Q = _held_out(len(outcomes), settings)
    tried = _fit(
        X_QF[~held_out_Q], scores_QM[~held_out_Q], list(compress(tags, ~held_out_Q)), settings
    )
    logits_QM, unseen_QM = tried.logits(X_QF[held_out_Q]), scores_QM[held_out_Q]
    platt = fit_platt(logits_QM, unseen_QM)
    heads = _fit(X_QF, scores_QM, tags, settings)
    facts = {
        "data_sha256": content_sha256(outcomes),
        "num_queries": len(outcomes),
        "settings": asdict(settings),
        "held_out": held_out_metrics(platt.scaled(logits_QM), unseen_QM),
    }
    return Router(
        models=table.models,
        encoder=encoder,
        # Calibration is affine in the logits, so it costs nothing when it is part of the heads.
        weights_FM=heads.weights_FM * np.float32(platt.slope),
        bias_M=heads.bias_M * np.float32(platt.slope) + np.float32(platt.offset),
        topics=topics,
        output_tokens_M=_mean_output_tokens(outcomes, table.models),
        facts=facts,
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


def _fit(
    X_QF: sp.csr_matrix, scores_QM: Floats, tags: Sequence[Sequence[str]], settings: FitSettings
) -> Heads:
    targets_QM = enhance(scores_QM, tags, beta=settings.beta)
    heads = fit_heads(X_QF, targets_QM, settings.objective)
    return with_differences(heads, X_QF, targets_QM, ridge=settings.ridge)


def _held_out(num_queries: int, settings: FitSettings) -> NDArray[np.bool_]:
    held_out_Q = np.zeros(num_queries, np.bool_)
    order = np.random.default_rng(settings.seed).permutation(num_queries)
    held_out_Q[order[: round(settings.held_out_share * num_queries)]] = True
    return held_out_Q


def _mean_output_tokens(outcomes: Sequence[Outcome], models: Sequence[str]) -> NDArray[np.float32]:
    nan = float("nan")
    tokens_QM = np.array([[o.output_tokens.get(name, nan) for name in models] for o in outcomes])
    known = ~np.isnan(tokens_QM)
    total, count = np.where(known, tokens_QM, 0).sum(0), known.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), nan).astype(np.float32)
