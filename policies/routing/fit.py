"""Trains a router on outcomes, over a frozen encoder.

The heads are fitted twice: on a part of the data, to calibrate and measure on the rest, so that
probabilities and metrics are those of new queries; then on all of it.

Shape legend: Q queries, F features, M models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, StratifiedKFold
from threadpoolctl import threadpool_limits

from policies.cascade.base import Readings
from policies.encoders.base import Encoder, build_encoder
from policies.errors import PolicyError
from policies.outcomes import Outcome, content_sha256, score_table
from policies.routing.heads import (
    Heads,
    Objective,
    field_weights,
    fit_heads,
    fit_platt,
    mean_scores,
    reliability,
)
from policies.routing.looks import Look, fit_look
from policies.routing.nearness import (
    NUM_FOLDS,
    Doubt,
    fit_doubt,
    fit_landmarks,
    fit_topics,
)
from policies.routing.phrases import SMALL_TALK, clauses, wrapped
from policies.routing.router import Router, query_hashes
from policies.routing.strength import WHOLE, choose_belief, choose_strength

Floats = NDArray[np.float64]

MIN_QUERIES = 20

SURELY_INSIDE = 0.5
"""A query with this similarity, of -1 (outside the field) to 1, is familiar, however much more
alike the field's own queries are."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a router is trained.

    `betas` are candidates for ZOOTER's share of a query's own score in its target, the rest being
    its tags' (or cluster's) mean; the paper uses 0.3 on noisy reward-model scores. `ridges` are
    candidates for how firmly differences among models are regularised. Which of them pay most is
    seen on left-out queries and tasks (see `strength`). `num_landmarks`, `sharpness` and
    `landmark_weight` say how far heads may bend (see `nearness`); with no landmarks they are
    linear.
    About `unfamiliar_share` of new queries like the training's are treated as unlike it.
    """

    objective: Objective = field(default_factory=Objective)
    betas: tuple[float, ...] = (0.0, 0.35, 0.7, 1.0)
    ridges: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    num_landmarks: int = 512
    sharpness: float = 3.0
    landmark_weight: float = 4.0
    num_clusters: int = 32
    unfamiliar_share: float = 0.01
    held_out_share: float = 0.25
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Outcomes with at least one score, and their scores (NaN where unknown).

    `home_Q` says which are of the router's own field, and which from outside it.
    """

    models: tuple[str, ...]
    outcomes: Sequence[Outcome]
    scores_QM: Floats
    home_Q: NDArray[np.bool_]

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

    def parts(self, share: float, seed: int) -> list[NDArray[np.bool_]]:
        """Return a division of the queries into parts of about this share each."""
        order = np.random.default_rng(seed).permutation(len(self.outcomes))
        size = round(share * len(order))
        starts = range(size, size * round(1 / share), size)
        return [np.isin(np.arange(len(order)), part) for part in np.split(order, list(starts))]

    def held_out(self, share: float, seed: int) -> NDArray[np.bool_]:
        """Return which queries calibrate and measure, instead of training: the first part."""
        return self.parts(share, seed)[0]

    def mean_output_tokens(self) -> NDArray[np.float32]:
        """Return the models' mean answer lengths, NaN where unknown."""
        nan = float("nan")
        tokens_QM = np.array(
            [[o.output_tokens.get(name, nan) for name in self.models] for o in self.outcomes]
        )
        known = ~np.isnan(tokens_QM)
        total, count = np.where(known, tokens_QM, 0).sum(0), known.sum(0)
        return np.where(count > 0, total / np.maximum(count, 1), nan).astype(np.float32)


def make_examples(
    outcomes: Sequence[Outcome],
    models: Sequence[str] | None = None,
    outside: Sequence[Outcome] = (),
) -> Examples:
    """Return the examples for `models` (default: all that have scores).

    Raises `PolicyError` for too few outcomes and `OutcomesError` for a model without scores.
    """
    if len(outcomes) < MIN_QUERIES:
        raise PolicyError(f"{len(outcomes)} outcomes are too few to train on; give {MIN_QUERIES}")
    every = [*outcomes, *outside]
    table = score_table(every, models)
    scored: NDArray[np.bool_] = ~np.all(np.isnan(table.scores_QM), axis=1)
    return Examples(
        models=table.models,
        outcomes=list(compress(every, scored)),
        scores_QM=table.scores_QM[scored],
        home_Q=(np.arange(len(every)) < len(outcomes))[scored],
    )


def fit_router(
    outcomes: Sequence[Outcome],
    *,
    encoder: Encoder,
    models: Sequence[str] | None = None,
    settings: FitSettings | None = None,
    outside: Sequence[Outcome] = (),
    readings: Readings | None = None,
) -> Router:
    """Fit the encoder, the clusters, the landmarks, the heads and their calibration.

    `models` (default: all that have scores) are the members to route between. `outside` are
    outcomes from beyond the field that `outcomes` cover: the heads learn from them who answers
    there, and doubt to tell them from the field's and what to expect then (outlier exposure,
    Hendrycks et al. 2019); everything is then learned twice, the second time with everyday phrases
    around it (`phrases`). From models' `readings` of the queries it learns what these change
    (`looks`). Raises `PolicyError` for too few outcomes and `OutcomesError` for a
    model without scores.
    """
    settings = settings or FitSettings()
    examples = make_examples(outcomes, models, outside)
    # Two threads of our own do more than BLAS's, which wait for each other without giving way.
    with threadpool_limits(1):
        return _fit_router(examples, encoder, settings, readings or {})


def refit_like(router: Router) -> Callable[[Sequence[Outcome]], Router]:
    """Return what trains a router for the same models over an encoder like `router`'s.

    Raises `PolicyError` for an encoder that was trained itself: it has seen the outcomes.
    """
    if router.encoder.kind == "finetuned":
        raise PolicyError("its encoder was trained end to end and knows the outcomes already")

    def fit(outcomes: Sequence[Outcome]) -> Router:
        encoder = build_encoder(router.encoder.kind, router.encoder.settings())
        return fit_router(outcomes, encoder=encoder, models=router.models)

    return fit


def _fit_router(
    examples: Examples, encoder: Encoder, settings: FitSettings, readings: Readings
) -> Router:
    scores_QM, home_Q = examples.scores_QM, examples.home_Q
    num_queries = len(home_Q)
    # Where there is an outside, phrases must not tell it from the field; copies come after all.
    copies = [] if home_Q.all() else wrapped(examples.texts, seed=settings.seed)
    num_copies = 2 if copies else 1
    encoded = encoder.fit_encode([*examples.texts, *copies])
    points_QD = encoded.points_QD[:num_queries]
    topics = fit_topics(
        points_QD[home_Q],
        scores_QM[home_Q],
        num_clusters=settings.num_clusters,
        seed=settings.seed,
    )
    landmarks = fit_landmarks(
        encoded.points_QD,
        num_landmarks=settings.num_landmarks,
        sharpness=settings.sharpness,
        weight=settings.landmark_weight,
        seed=settings.seed,
    )
    both_QF = landmarks.beside(encoded)
    X_QF = both_QF[:num_queries]
    tags = examples.tags(topics.assign(points_QD))
    if home_Q.all():
        field_F, talk_F, doubt = None, None, make_doubt(points_QD, scores_QM, tags, settings)
    else:
        field_F = field_weights(both_QF, np.tile(home_Q, num_copies))
        doubt = outside_doubt(examples, both_QF, settings)
        talk_F, talk_above = fit_talk(
            examples,
            lambda texts: landmarks.beside(encoder.encode(texts)),
            field_F=field_F,
            familiar_above=doubt.familiar_above,
            settings=settings,
        )
        doubt = replace(doubt, talk_above=talk_above)
    held_out_Q = examples.held_out(settings.held_out_share, settings.seed)
    unseen_QF, unseen_QM = X_QF[held_out_Q], scores_QM[held_out_Q]
    strength = choose_strength(
        X_QF,
        scores_QM,
        tags,
        betas=settings.betas,
        ridges=settings.ridges,
        seed=settings.seed,
    )
    belief = WHOLE  # what is unlike a field is told apart, and gets the safe plan
    if field_F is None:
        belief = choose_belief(
            X_QF,
            points_QD,
            scores_QM,
            tags,
            strength,
            num_clusters=settings.num_clusters,
            seed=settings.seed,
        )
    share_Q = belief.of(topics.similarities(points_QD))

    def fit(rows_Q: NDArray[np.bool_]) -> Heads:
        return fit_heads(
            both_QF[np.tile(rows_Q, num_copies)],
            np.tile(scores_QM[rows_Q], (num_copies, 1)),
            list(compress(tags, rows_Q)) * num_copies,
            settings.objective,
            beta=strength.beta,
            ridge=strength.ridge,
        )

    # Two cores' work: sparse products let other threads run.
    with ThreadPoolExecutor(1) as aside:
        fitting_all = aside.submit(fit, np.ones_like(held_out_Q))
        logits_QM = fit(~held_out_Q).logits(unseen_QF, share_Q[held_out_Q])
        platt = fit_platt(logits_QM, unseen_QM)
        heads = platt.scaled(fitting_all.result())

    def expected_unseen(parts: Iterable[NDArray[np.bool_]]) -> Floats:
        """Return what heads that have not seen a query's part expect of it, [Q, M]."""
        expected_QM = np.empty_like(scores_QM)
        for out_Q in parts:
            logits_QM = fit(~out_Q).logits(X_QF[out_Q], share_Q[out_Q])
            expected_QM[out_Q] = platt.probabilities(logits_QM)
        return expected_QM

    def left_out() -> Floats:
        """Return what is expected of a query unseen: half by heads that know its task, and half by
        such as do not, where readings tell most."""
        alone_QM = expected_unseen(examples.parts(settings.held_out_share, settings.seed))
        tasks = [row[0] for row in tags]
        num_parts = min(NUM_FOLDS, len(set(tasks)))
        if num_parts < 2:
            return alone_QM
        parts = GroupKFold(num_parts).split(tasks, groups=tasks)
        numbers_Q = np.arange(len(tasks))
        return (alone_QM + expected_unseen(np.isin(numbers_Q, out) for _, out in parts)) / 2

    return Router(
        models=examples.models,
        encoder=encoder,
        landmarks=landmarks,
        weights_FM=heads.weights_FM,
        bias_M=heads.bias_M,
        field_F=field_F,
        talk_F=talk_F,
        belief=belief,
        topics=topics,
        doubt=doubt,
        output_tokens_M=examples.mean_output_tokens(),
        seen_Q=np.unique(query_hashes(examples.texts)),
        looks=_fit_looks(examples, left_out(), readings) if readings else {},
        facts={
            "data_sha256": content_sha256(examples.outcomes),
            "num_queries": int(home_Q.sum()),
            "num_outside": int((~home_Q).sum()),
            "settings": asdict(settings),
            **asdict(strength),
            "held_out": held_out_metrics(
                platt.probabilities(logits_QM)[home_Q[held_out_Q]], unseen_QM[home_Q[held_out_Q]]
            ),
        },
    )


def _fit_looks(examples: Examples, expected_QM: Floats, readings: Readings) -> dict[str, Look]:
    """Return the looks that tell something, by model; those of the router's own field alone."""
    missed_QM = np.where(examples.home_Q[:, None], examples.scores_QM - expected_QM, np.nan)
    found = {}
    for m, name in enumerate(examples.models):
        told = readings.get(name, {})
        look = fit_look([told.get(text) for text in examples.texts], missed_QM[:, m])
        if look is not None:
            found[name] = look
    return found


def make_doubt(
    points_QD: NDArray[np.float32],
    scores_QM: Floats,
    tags: Sequence[Sequence[str]],
    settings: FitSettings,
) -> Doubt:
    """Return `fit_doubt` of the settings; a query's task is its first tag."""
    return fit_doubt(
        points_QD,
        scores_QM,
        [row[0] for row in tags],
        num_clusters=settings.num_clusters,
        unfamiliar_share=settings.unfamiliar_share,
        seed=settings.seed,
    )


def outside_doubt(examples: Examples, both_QF: sp.csr_matrix, settings: FitSettings) -> Doubt:
    """Set the threshold where queries from outside the field were measured, by cross-validation.

    `both_QF` are the queries and then their copies.

    Similarity is then what `field_weights` give. What to expect of models below the threshold is
    what they scored outside, and nothing shrinks further: how strange these queries are was known
    when the models were asked.
    """
    home_Q, scores_QM = examples.home_Q, examples.scores_QM
    similarity_Q = np.empty(len(home_Q), np.float32)
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=settings.seed)
    for seen, unseen in folds.split(home_Q, home_Q):
        field_F = field_weights(
            both_QF[np.concatenate([seen, seen + len(home_Q)])], np.tile(home_Q[seen], 2)
        )
        similarity_Q[unseen] = both_QF[unseen] @ field_F
    tail = float(np.quantile(similarity_Q[home_Q], settings.unfamiliar_share))
    familiar_above = min(tail, SURELY_INSIDE)
    strange_Q = ~home_Q & (similarity_Q < familiar_above)
    return Doubt(
        familiar_above=familiar_above,
        left_out_M=mean_scores(scores_QM[strange_Q if strange_Q.any() else ~home_Q]).astype(
            np.float32
        ),
        left_out_similarity_U=np.array([np.finfo(np.float32).min], np.float32),
    )


def fit_talk(
    examples: Examples,
    features: Callable[[Sequence[str]], sp.csr_matrix],
    *,
    field_F: NDArray[np.float32],
    familiar_above: float,
    settings: FitSettings,
) -> tuple[NDArray[np.float32], float]:
    """Return what tells small talk from requests, [F], and the least that it and similarity have
    together of small talk.

    Small talk are the phrases, and the clauses of the field's own questions that are unlike it by
    themselves ("Anna has 9 pens."); requests are what was asked outside. The limit lies midway
    between what all but 1% of the phrases have in cross-validation, and half of the requests.
    """
    home = compress(examples.texts, examples.home_Q)
    away = list(compress(examples.texts, ~examples.home_Q))
    parts = list(dict.fromkeys(p for text in home for p in clauses(text) if p != text.strip()))
    unlike = compress(parts, features(parts) @ field_F < familiar_above) if parts else ()
    talk = [*SMALL_TALK, *unlike]
    X_QF = features([*talk, *away])
    is_talk_Q = np.arange(len(talk) + len(away)) < len(talk)
    both_Q: NDArray[np.float32] = X_QF @ field_F
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=settings.seed)
    for seen, unseen in folds.split(is_talk_Q, is_talk_Q):
        both_Q[unseen] += X_QF[unseen] @ field_weights(X_QF[seen], is_talk_Q[seen])
    least = np.quantile(both_Q[: len(SMALL_TALK)], settings.unfamiliar_share)
    usual = np.median(both_Q[~is_talk_Q])
    return field_weights(X_QF, is_talk_Q), float(least + usual) / 2


def held_out_metrics(quality_QM: Floats, scores_QM: Floats) -> dict[str, Any]:
    """Return what choosing the best predicted model scores, beside its references.

    The choice is among the models whose score is known; a query with one such model has none.
    """
    known_QM = ~np.isnan(scores_QM)
    choice_Q = known_QM.sum(1) > 1
    quality, scores, known = quality_QM[choice_Q], scores_QM[choice_Q], known_QM[choice_Q]
    metrics: dict[str, Any] = {
        "ece": round(reliability(quality_QM.ravel(), scores_QM.ravel()).ece, 4),
        "num_queries": int(choice_Q.sum()),
        "accuracy": None,
        "best_single": None,
        "oracle": None,
    }
    if choice_Q.any():
        best_Q = np.where(known, quality, -np.inf).argmax(1)
        chosen = np.take_along_axis(scores, best_Q[:, None], 1)
        metrics["accuracy"] = round(float(chosen.mean()), 4)
        metrics["best_single"] = round(float(mean_scores(scores).max()), 4)
        metrics["oracle"] = round(float(np.nanmax(scores, 1).mean()), 4)
    return metrics
