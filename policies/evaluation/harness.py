"""One run: train on every training part of a protocol, test all methods on the rest.

Shape legend: Q queries, M models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.encoders.base import Encoder
from policies.evaluation.baselines import BASELINES, Split
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

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one method reached on the pooled test queries; intervals are 95% bootstrap.

    APGR and CPT exist for two models only (weak first), `diagram` for methods that predict, AIQ
    where models differ in cost. `decision_us` is the median time of one decision, for the methods
    that Shoal serves.
    """

    method: str
    accuracy: float
    accuracy_interval: Interval
    curve: Curve
    aiq: float | None = None
    apgr: float | None = None
    apgr_interval: Interval | None = None
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
    """All methods under one protocol. `num_removed` near-duplicates were kept out of training."""

    title: str
    models: tuple[str, ...]
    num_test: int
    num_removed: int
    results: tuple[Result, ...]


def evaluate(
    outcomes: Sequence[Outcome],
    *,
    title: str,
    protocol: Protocol,
    make_encoder: Callable[[], Encoder],
    models: Sequence[str],
    relative_cost: Sequence[float],
    train: str = "train",
    test: str = "test",
    settings: FitSettings | None = None,
    seed: int = 0,
) -> Report:
    """Run `protocol` over outcomes whose scores are known for all `models`.

    `relative_cost` is the cost of a query per model (any unit). With two models the first is the
    weak one. Raises `OutcomesError` where the protocol does not fit the outcomes.
    """
    predictions: dict[str, list[Floats]] = {name: [] for name in BASELINES}
    timings: list[float] = []
    tested: list[int] = []
    num_removed = 0
    for train_rows, test_rows in folds(outcomes, protocol, train=train, test=test, seed=seed):
        queries = [outcomes[row].query for row in test_rows]
        repeated = set(near_duplicates([outcomes[row].query for row in train_rows], queries))
        kept = [outcomes[row] for i, row in enumerate(train_rows) if i not in repeated]
        num_removed += len(repeated)
        split = Split(
            models=tuple(models),
            train=kept,
            test=[outcomes[row] for row in test_rows],
            router=fit_router(kept, encoder=make_encoder(), models=models, settings=settings),
            seed=seed,
        )
        for name, predict in BASELINES.items():
            predictions[name].append(predict(split))
        timings += _time_decisions(split)
        tested += test_rows
    scores_QM = score_table([outcomes[row] for row in tested], models).scores_QM
    cost_QM = np.tile(np.asarray(relative_cost, np.float64), (len(tested), 1))
    decision_us = float(np.median(timings))
    return Report(
        title=title,
        models=tuple(models),
        num_test=len(tested),
        num_removed=num_removed,
        results=tuple(
            judge(
                name,
                np.concatenate(parts),
                scores_QM,
                cost_QM,
                decision_us=decision_us if name in ("Learned", "Clusters") else None,
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
    decision_us: float | None = None,
) -> Result:
    """Return the metrics of predicted qualities against real scores."""
    chosen_Q = np.take_along_axis(scores_QM, quality_QM.argmax(1)[:, None], 1)[:, 0]
    num_queries, num_models = scores_QM.shape
    if num_models == 2:
        preference_Q = quality_QM[:, 1] - quality_QM[:, 0]
        weak_Q, strong_Q = scores_QM.T
        curve = two_model_curve(preference_Q, weak_Q, strong_Q)

        def resampled(rows: NDArray[np.intp]) -> float:
            return apgr(two_model_curve(preference_Q[rows], weak_Q[rows], strong_Q[rows]))

        interval = bootstrap(resampled, num_queries)
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
        cpt50=cpt(curve, 0.5) if two else None,
        cpt80=cpt(curve, 0.8) if two else None,
        diagram=reliability(quality_QM.ravel(), scores_QM.ravel()) if predicts else None,
        decision_us=decision_us,
    )


def _time_decisions(split: Split, num_queries: int = 200) -> list[float]:
    """Return how long single predictions take, in microseconds."""
    times = []
    for text in split.queries[:num_queries]:
        start_s = time.perf_counter()
        split.router.predict(text)
        times.append((time.perf_counter() - start_s) * 1e6)
    return times
