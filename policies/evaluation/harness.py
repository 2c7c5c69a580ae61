"""One run: train on every training part of a protocol, test all methods on the rest.

Shape legend: Q queries, M models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.encoders.base import Encoder
from policies.evaluation.baselines import BASELINES, ORACLES, Split, count_words
from policies.evaluation.metrics import (
    Curve,
    aiq,
    apgr,
    bootstrap,
    cpt,
    trade_curve,
    two_model_curve,
)
from policies.evaluation.overlap import near_duplicates
from policies.evaluation.protocols import Protocol, folds
from policies.outcomes import Outcome, score_table
from policies.routing.calibration import Reliability, reliability
from policies.routing.fit import FitSettings, fit_router
from policies.routing.router import Router

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one method reached on the pooled test queries; intervals are 95% bootstrap.

    APGR and CPT exist for two models only (weak first), `diagram` for methods that predict, AIQ
    where models differ in cost. `fold_apgrs` are the APGRs of each fold alone: the pooled one
    compares scores of routers that never meet. `decision_us` is the median time of one decision,
    for the methods that Shoal serves.
    """

    method: str
    accuracy: float
    accuracy_interval: Interval
    curve: Curve
    aiq: float | None = None
    apgr: float | None = None
    apgr_interval: Interval | None = None
    fold_apgrs: tuple[float, ...] = ()
    cpt50: float | None = None
    cpt80: float | None = None
    diagram: Reliability | None = None
    decision_us: float | None = None

    @property
    def ece(self) -> float | None:
        """Expected calibration error of the predictions."""
        return None if self.diagram is None else self.diagram.ece


@dataclass(frozen=True, kw_only=True)
class Report:
    """All methods under one protocol.

    `overlap` says what was done about test queries that training may have seen (may be empty).
    """

    title: str
    models: tuple[str, ...]
    num_test: int
    overlap: str
    results: tuple[Result, ...]


def evaluate(
    outcomes: Sequence[Outcome],
    *,
    title: str,
    protocol: Protocol,
    encoders: Mapping[str, Callable[[], Encoder]],
    models: Sequence[str],
    relative_cost: Sequence[float],
    train: str = "train",
    test: str = "test",
    settings: FitSettings | None = None,
    seed: int = 0,
) -> Report:
    """Run `protocol` over outcomes whose scores are known for all `models`.

    Trains Shoal's router once per encoder, of which `encoders` makes fresh ones by name.
    `relative_cost` is the cost of a query per model (any unit). With two models the first is the
    weak one. Raises `OutcomesError` where the protocol does not fit the outcomes.
    """
    learned = {name: f", {name}" if len(encoders) > 1 else "" for name in encoders}
    ours = [f"{policy}{label}" for label in learned.values() for policy in ("Clusters", "Learned")]
    predictions: dict[str, list[Floats]] = {name: [] for name in (*BASELINES, *ours, *ORACLES)}
    timings: dict[str, list[float]] = {name: [] for name in ours}
    tested: list[int] = []
    num_removed = 0
    texts = [outcome.query for outcome in outcomes]
    alike = near_duplicates(texts)
    words_QW = count_words(texts)
    for train_rows, test_rows in folds(outcomes, protocol, train=train, test=test, seed=seed):
        repeated = {other for row in test_rows for other in alike.get(row, ())}
        kept_rows = [row for row in train_rows if row not in repeated]
        kept = [outcomes[row] for row in kept_rows]
        num_removed += len(train_rows) - len(kept_rows)
        split = Split(
            models=tuple(models),
            train=kept,
            test=[outcomes[row] for row in test_rows],
            train_QW=words_QW[kept_rows],
            test_QW=words_QW[test_rows],
            seed=seed,
        )
        for name, predict in (*BASELINES.items(), *ORACLES.items()):
            predictions[name].append(predict(split))
        for name, label in learned.items():
            router = fit_router(kept, encoder=encoders[name](), models=models, settings=settings)
            predictions[f"Clusters{label}"].append(router.cluster_qualities(split.queries))
            predictions[f"Learned{label}"].append(router.qualities(split.queries))
            times_us = _time_decisions(router, split.queries)
            timings[f"Clusters{label}"] += times_us
            timings[f"Learned{label}"] += times_us
        tested += test_rows
    scores_QM = score_table([outcomes[row] for row in tested], models).scores_QM
    cost_QM = np.tile(np.asarray(relative_cost, np.float64), (len(tested), 1))
    return Report(
        title=title,
        models=tuple(models),
        num_test=len(tested),
        overlap=f"{num_removed:,} near-duplicates kept out of training",
        results=tuple(
            judge(
                name,
                np.concatenate(parts),
                scores_QM,
                cost_QM,
                fold_sizes=[len(part) for part in parts],
                decision_us=float(np.median(timings[name])) if name in timings else None,
            )
            for name, parts in predictions.items()
        ),
    )


def judge(
    method: str,
    quality_QM: Floats,
    scores_QM: Floats,
    cost_QM: Floats,
    *,
    fold_sizes: Sequence[int] = (),
    decision_us: float | None = None,
) -> Result:
    """Return the metrics of predicted qualities against real scores, row by row.

    `fold_sizes` say how many rows each fold has, in order (default: all are one).
    """
    chosen_Q = np.take_along_axis(scores_QM, quality_QM.argmax(1)[:, None], 1)[:, 0]
    num_queries, num_models = scores_QM.shape
    if num_models == 2:
        preference_Q = quality_QM[:, 1] - quality_QM[:, 0]
        weak_Q, strong_Q = scores_QM.T
        curve = two_model_curve(preference_Q, weak_Q, strong_Q)

        def resampled(rows: NDArray[np.intp]) -> float:
            return apgr(two_model_curve(preference_Q[rows], weak_Q[rows], strong_Q[rows]))

        interval = bootstrap(resampled, num_queries)
        fold_rows = np.split(np.arange(num_queries), np.cumsum(fold_sizes or [num_queries])[:-1])
        fold_apgrs = tuple(resampled(rows) for rows in fold_rows)
    else:
        curve = trade_curve(quality_QM, scores_QM, cost_QM)
    two = num_models == 2
    predicts = method not in ("random", "per-query oracle")
    return Result(
        method=method,
        accuracy=float(chosen_Q.mean()),
        accuracy_interval=bootstrap(lambda rows: float(chosen_Q[rows].mean()), num_queries),
        curve=curve,
        aiq=aiq(curve, float(cost_QM.max())) if np.ptp(cost_QM) > 0 else None,
        apgr=apgr(curve) if two else None,
        apgr_interval=interval if two else None,
        fold_apgrs=fold_apgrs if two else (),
        cpt50=cpt(curve, 0.5) if two else None,
        cpt80=cpt(curve, 0.8) if two else None,
        diagram=reliability(quality_QM.ravel(), scores_QM.ravel()) if predicts else None,
        decision_us=decision_us,
    )


def _time_decisions(router: Router, queries: Sequence[str], num_queries: int = 50) -> list[float]:
    """Return how long single predictions take, in microseconds."""
    times = []
    for text in queries[:num_queries]:
        start_s = time.perf_counter()
        router.predict(text)
        times.append((time.perf_counter() - start_s) * 1e6)
    return times
