"""How good a router is on outcomes it has not seen, beside chance, the best single and oracles.

Shape legend: Q queries, M models.
"""

from __future__ import annotations

import math
import re
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.errors import PolicyError
from policies.evaluation.metrics import (
    Curve,
    aiq,
    apgr,
    bootstrap,
    cpt,
    trade_curve,
    two_model_curve,
)
from policies.outcomes import Outcome, content_sha256, score_table
from policies.routing.fit import Reliability, reliability
from policies.routing.router import Router

Floats = NDArray[np.float64]
Interval = tuple[float, float]

NUM_SHINGLE_WORDS = 4
LIKENESS = 0.8
NUM_TIMED = 500


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


def evaluate_router(
    router: Router,
    outcomes: Sequence[Outcome],
    *,
    models: Sequence[str] | None = None,
    trained_on: Sequence[Outcome] = (),
) -> tuple[Report, Reliability]:
    """Judge `router`'s choice among `models` (default: all it knows) on queries scored for all.

    Queries that repeat one of `trained_on`, or nearly, are left out. Of two models the one with the
    lower mean score counts as the weak one. Returns the report and the heads' reliability diagram.
    Raises `PolicyError` for a model the router does not know, or where no query is left.
    """
    names = tuple(models or router.models)
    for name in names:
        if name not in router.models:
            raise PolicyError(
                f"the router knows nothing of {name!r}; it knows {', '.join(router.models)}"
            )
    scores_QM = score_table(outcomes, names).scores_QM
    complete = ~np.isnan(scores_QM).any(1)
    if not complete.any():
        raise PolicyError(f"no outcome has scores for all of {', '.join(names)}")
    if len(names) == 2 and np.diff(scores_QM[complete].mean(0)) < 0:
        names, scores_QM = names[::-1], scores_QM[:, ::-1]
    seen = _seen(outcomes, trained_on)
    tested = complete & ~seen
    if not tested.any():
        raise PolicyError("every query with all scores repeats one that was trained on")
    scores_QM = scores_QM[tested]
    rows = [outcomes[q] for q in np.flatnonzero(tested).tolist()]
    queries = [row.query for row in rows]
    columns = [router.models.index(name) for name in names]
    tasks = np.array([row.tags[0] if row.tags else "" for row in rows])
    task_QM = np.empty_like(scores_QM)
    for task in np.unique(tasks):
        task_QM[tasks == task] = scores_QM[tasks == task].mean(0)
    learned_QM = router.qualities(queries)[:, columns]
    predictions = {
        "random": np.random.default_rng(0).random(scores_QM.shape),
        "best single": np.tile(scores_QM.mean(0), (len(rows), 1)),
        "Clusters": router.cluster_qualities(queries)[:, columns],
        "Learned": learned_QM,
        "dataset oracle": task_QM,
        "per-query oracle": scores_QM,
    }
    cost_QM = np.ones_like(scores_QM)  # the file knows no prices
    report = Report(
        title=f"Choice among {', '.join(names)}",
        models=names,
        num_test=len(rows),
        overlap=_overlap(router, outcomes, trained_on, int((complete & seen).sum())),
        results=tuple(
            judge(
                name,
                quality_QM,
                scores_QM,
                cost_QM,
                decision_us=median_decision_us(router, queries) if name == "Learned" else None,
            )
            for name, quality_QM in predictions.items()
        ),
    )
    return report, reliability(learned_QM.ravel(), scores_QM.ravel())


def _seen(outcomes: Sequence[Outcome], trained_on: Sequence[Outcome]) -> NDArray[np.bool_]:
    """Return which outcomes' queries (nearly) repeat one that was trained on."""
    first = len(trained_on)
    if not first:
        return np.zeros(len(outcomes), np.bool_)
    alike = near_duplicates([o.query for o in trained_on] + [o.query for o in outcomes])
    repeats = [min(alike.get(first + row, {first})) < first for row in range(len(outcomes))]
    return np.array(repeats, np.bool_)


def _overlap(
    router: Router, outcomes: Sequence[Outcome], trained_on: Sequence[Outcome], num_seen: int
) -> str:
    if trained_on:
        return f"left out as repeats of what was trained on: {num_seen:,}"
    if router.facts.get("data_sha256") == content_sha256(outcomes):
        return "the very queries that it was trained on"
    return ""


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


def median_decision_us(router: Router, queries: Sequence[str]) -> float:
    """Return how long one prediction takes, in microseconds."""
    times_s = []
    for text in queries[:NUM_TIMED]:
        start_s = time.perf_counter()
        router.predict(text)
        times_s.append(time.perf_counter() - start_s)
    return float(np.median(times_s)) * 1e6


def near_duplicates(texts: Sequence[str]) -> dict[int, set[int]]:
    """Return, for every row of `texts` that (nearly) repeats others, the rows of those.

    Queries are near-duplicates if the Jaccard similarity of their sets of four-word shingles
    (upper and lower case, punctuation and white space ignored) is at least 0.8. Candidates come
    from prefix filtering (Chaudhuri, Ganti & Kaushik 2006): with all sets in one order, rarest
    shingle first, two such sets share a shingle among the first n - ⌈0.8·n⌉ + 1 of each. Exact.
    """
    sets = [_shingles(text) for text in texts]
    frequency = Counter(shingle for shingles in sets for shingle in shingles)
    earlier: dict[int, list[int]] = defaultdict(list)
    alike: dict[int, set[int]] = defaultdict(set)
    for row, shingles in enumerate(sets):
        prefix = _prefix(shingles, frequency)
        for other in {other for shingle in prefix for other in earlier[shingle]}:
            if _likeness(shingles, sets[other]) >= LIKENESS:
                alike[row].add(other)
                alike[other].add(row)
        for shingle in prefix:
            earlier[shingle].append(row)
    return dict(alike)


def _prefix(shingles: frozenset[int], frequency: Mapping[int, int]) -> list[int]:
    num_shingles = len(shingles)
    length = num_shingles - math.ceil(LIKENESS * num_shingles) + 1
    return sorted(shingles, key=lambda shingle: (frequency[shingle], shingle))[:length]


def _shingles(text: str) -> frozenset[int]:
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - NUM_SHINGLE_WORDS + 1)
    return frozenset(
        zlib.crc32(" ".join(words[i : i + NUM_SHINGLE_WORDS]).encode("utf-8", "replace"))
        for i in range(last)
    )


def _likeness(one: frozenset[int], other: frozenset[int]) -> float:
    if min(len(one), len(other)) < LIKENESS * max(len(one), len(other)):
        return 0.0  # too different in size to be worth intersecting
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
