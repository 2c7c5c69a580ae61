"""Trains a router on outcomes, over a frozen encoder.

The heads are fitted twice: on a part of the data, to calibrate and measure on the rest, so that
probabilities and metrics are those of new queries; then on all of it.

Shape legend: Q queries, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import compress

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from policies.encoders.base import Encoder
from policies.outcomes import Outcome, content_sha256
from policies.routing.bags import fit_bags, with_usual_spread
from policies.routing.calibration import fit_platt
from policies.routing.differences import best_ridge, least_squares_heads, with_differences
from policies.routing.examples import Examples, held_out_metrics, make_examples
from policies.routing.heads import Heads, Objective, fit_heads
from policies.routing.landmarks import fit_landmarks
from policies.routing.router import Router
from policies.routing.targets import enhance
from policies.routing.topics import fit_topics

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a router is trained.

    `beta` is ZOOTER's share of a query's own score in its target, the rest being its tags' (or
    cluster's) mean; the paper uses 0.3 on noisy reward-model scores, exact scores bear more.
    What sets models apart is regularised by whichever of `ridges` predicts held-out queries best
    (see `differences`). `num_landmarks`, `sharpness` and `landmark_weight` say how far heads may
    bend (see `landmarks`); with no landmarks they are linear.
    `unfamiliar_share` of queries like the training's are treated as unlike it, and as many as in
    doubt because `num_bags` bootstrap fits disagree.
    """

    objective: Objective = field(default_factory=Objective)
    beta: float = 0.7
    ridges: tuple[float, ...] = (1.0, 10.0)
    num_landmarks: int = 512
    sharpness: float = 3.0
    landmark_weight: float = 4.0
    num_bags: int = 5
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
    """Fit the encoder, the clusters, the landmarks, the heads, their calibration and the bags.

    `models` (default: all that have scores) are the members to route between. Raises
    `PolicyError` for too few outcomes and `OutcomesError` for a model without scores.
    """
    settings = settings or FitSettings()
    examples = make_examples(outcomes, models)
    # Two threads of our own do more than BLAS's, which wait for each other without giving way.
    with threadpool_limits(1):
        return _fit_router(examples, encoder, settings)


def _fit_router(examples: Examples, encoder: Encoder, settings: FitSettings) -> Router:
    scores_QM = examples.scores_QM
    encoder = encoder.fit(examples.texts)
    encoded = encoder.encode(examples.texts)
    topics = fit_topics(
        encoded.points_QD,
        scores_QM,
        num_clusters=settings.num_clusters,
        unfamiliar_share=settings.unfamiliar_share,
        seed=settings.seed,
    )
    landmarks = fit_landmarks(
        encoded.points_QD,
        num_landmarks=settings.num_landmarks,
        sharpness=settings.sharpness,
        weight=settings.landmark_weight,
        seed=settings.seed,
    )
    X_QF = landmarks.beside(encoded)
    tags = examples.tags(topics.assign(encoded.points_QD))
    held_out_Q = examples.held_out(settings.held_out_share, settings.seed)
    seen_QF, seen_QM = X_QF[~held_out_Q], scores_QM[~held_out_Q]
    unseen_QF, unseen_QM = X_QF[held_out_Q], scores_QM[held_out_Q]
    ridge = best_ridge(seen_QF, seen_QM, unseen_QF, unseen_QM, ridges=settings.ridges)
    # Two cores' work: sparse products let other threads run.
    with ThreadPoolExecutor(1) as aside:
        fitting_all = aside.submit(_fit, X_QF, scores_QM, tags, settings, ridge)
        tried = _fit(seen_QF, seen_QM, list(compress(tags, ~held_out_Q)), settings, ridge)
        logits_QM = tried.logits(unseen_QF)
        platt = fit_platt(logits_QM, unseen_QM)
        bags = fit_bags(
            seen_QF, seen_QM, num_bags=settings.num_bags, ridge=ridge, seed=settings.seed
        )
        heads = fitting_all.result()
    return Router(
        models=examples.models,
        encoder=encoder,
        landmarks=landmarks,
        # Calibration is affine in the logits, so it costs nothing when it is part of the heads.
        weights_FM=heads.weights_FM * np.float32(platt.slope),
        bias_M=heads.bias_M * np.float32(platt.slope) + np.float32(platt.offset),
        topics=topics,
        bags=with_usual_spread(
            bags, unseen_QF, logits_QM.argmax(1), doubtful_share=settings.unfamiliar_share
        ),
        output_tokens_M=examples.mean_output_tokens(),
        facts={
            "data_sha256": content_sha256(examples.outcomes),
            "num_queries": len(examples.outcomes),
            "settings": asdict(settings),
            "ridge": ridge,
            "held_out": held_out_metrics(platt.scaled(logits_QM), unseen_QM),
        },
    )


def _fit(
    X_QF: sp.csr_matrix,
    scores_QM: Floats,
    tags: Sequence[Sequence[str]],
    settings: FitSettings,
    ridge: float,
) -> Heads:
    targets_QM = enhance(scores_QM, tags, beta=settings.beta)
    differences = least_squares_heads(X_QF, targets_QM, ridge=ridge)
    levels = fit_heads(X_QF, targets_QM, settings.objective, start_from=differences)
    return with_differences(levels, differences)
