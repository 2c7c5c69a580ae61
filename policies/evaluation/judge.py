"""How good a router is on outcomes it has not seen, beside chance, the best single and oracles.

Shape legend: Q queries, M models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
from policies.outcome_sets import fold_names, near_duplicates
from policies.outcomes import Outcome, content_sha256, score_table
from policies.routing.heads import Reliability, reliability
from policies.routing.router import Router

Floats = NDArray[np.float64]
Interval = tuple[float, float]

Protocol = Literal["folds", "tasks", "split"]

NUM_TIMED = 500


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one method reached on the pooled test queries; intervals are 95% bootstrap.

    APGR and CPT exist for two models only (weak first) whose means differ, `diagram` for methods
    that predict, AIQ and `usd`, the mean cost of the choices, where costs are known. `fold_apgrs`
    are the APGRs of each fold alone: the pooled one compares scores of routers that never meet.
    `decision_us` is the median time of one decision, for the methods that Shoal serves.
    """

    method: str
    accuracy: float
    accuracy_interval: Interval
    curve: Curve
    usd: float | None = None
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

    `overlap` says which queries were left out, and why, or trained on (may be empty).
    `by_task` holds each method's accuracy by task, empty for a single one.
    """

    title: str
    models: tuple[str, ...]
    num_test: int
    overlap: str
    results: tuple[Result, ...]
    by_task: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def evaluate_router(
    router: Router,
    outcomes: Sequence[Outcome],
    *,
    models: Sequence[str] | None = None,
    trained_on: Sequence[Outcome] = (),
    seen: bool = False,
) -> tuple[Report, Reliability]:
    """Judge `router`'s choice among `models` (default: all it knows) on queries scored for all.

    Queries that it was trained on are left out unless `seen`, as are those that repeat one of
    `trained_on`, or nearly. Of two models the one with the lower mean score counts as the weak one.
    AIQ needs some cost of every model; where it is not known of a query, it is the model's mean.
    Returns the report and the heads' reliability diagram. Raises `PolicyError` for a model the
    router does not know, or where no query is left.
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
    names = _weak_first(outcomes, names)
    scores_QM = score_table(outcomes, names).scores_QM
    known = router.facts.get("data_sha256") == content_sha256(outcomes)
    seen_Q = router.has_seen([row.query for row in outcomes]) | known
    repeats = _repeats(outcomes, trained_on)
    tested = complete & ~repeats if seen else complete & ~repeats & ~seen_Q
    if not tested.any():
        raise PolicyError(
            "the router was trained on every query that has all scores, and would look better than "
            "it is; give others, let --protocol train anew on parts of them, or say --seen"
        )
    left_out = {
        "lack a score": ~complete,
        "repeat what was trained on": complete & repeats,
        "were trained on": complete & ~repeats & seen_Q & (not seen),
    }
    told = [f"{int(rows.sum()):,} that {why}" for why, rows in left_out.items() if rows.any()]
    overlap = f"left out: {', '.join(told)}" if told else ""
    if (tested & seen_Q).any():
        overlap = f"{int((tested & seen_Q).sum()):,} were trained on; {overlap}".rstrip("; ")
    scores_QM = scores_QM[tested]
    rows = [outcomes[q] for q in np.flatnonzero(tested).tolist()]
    queries = [row.query for row in rows]
    columns = [router.models.index(name) for name in names]
    tasks = [row.tags[0] if row.tags else "" for row in rows]
    learned_QM = router.qualities(queries)[:, columns]
    return (
        compare(
            f"Choice among {', '.join(names)}",
            names,
            {
                "Clusters": router.cluster_qualities(queries)[:, columns],
                "Learned": learned_QM,
            },
            scores_QM,
            tasks=tasks,
            cost_QM=_costs(rows, names),
            overlap=overlap,
            decision_us=median_decision_us(router, queries),
        ),
        reliability(learned_QM.ravel(), scores_QM.ravel()),
    )


def _weak_first(outcomes: Sequence[Outcome], names: tuple[str, ...]) -> tuple[str, ...]:
    """Return `names`, of two that with the lower mean score first; queries scored for all count."""
    scores_QM = score_table(outcomes, names).scores_QM
    if len(names) != 2:
        return names
    weak, strong = np.nanmean(scores_QM[~np.isnan(scores_QM).any(1)], axis=0)
    return names if weak <= strong else names[::-1]


def compare(
    title: str,
    models: Sequence[str],
    predictions: Mapping[str, Floats],
    scores_QM: Floats,
    *,
    tasks: Sequence[str],
    cost_QM: Floats,
    overlap: str = "",
    decision_us: float | None = None,
) -> Report:
    """Judge `predictions` of quality by method, beside chance, the best single model and oracles.

    With several `tasks` (one per query) there are the oracle that knows each query's task, and each
    method's accuracy by task. `decision_us` is the last method's.
    """
    labels, tasks_Q = sorted(set(tasks)), np.array(tasks)
    where = {label: tasks_Q == label for label in labels}
    every = {
        "random": np.random.default_rng(0).random(scores_QM.shape),
        "best single": np.tile(scores_QM.mean(0), (len(scores_QM), 1)),
        **predictions,
    }
    if len(labels) > 1:
        task_QM = np.empty_like(scores_QM)
        for rows_Q in where.values():
            task_QM[rows_Q] = scores_QM[rows_Q].mean(0)
        every["dataset oracle"] = task_QM
    every["per-query oracle"] = scores_QM
    *_, timed = predictions
    results = [
        judge(
            name, quality_QM, scores_QM, cost_QM, decision_us=decision_us if name == timed else None
        )
        for name, quality_QM in every.items()
    ]
    by_task = {
        label: {name: float(chosen_scores(quality_QM[rows_Q], scores_QM[rows_Q]).mean())
                for name, quality_QM in every.items()}
        for label, rows_Q in where.items()
    }  # fmt: skip
    return Report(
        title=title,
        models=tuple(models),
        num_test=len(scores_QM),
        overlap=overlap,
        results=tuple(results),
        by_task=by_task if len(labels) > 1 else {},
    )


def evaluate_protocol(
    outcomes: Sequence[Outcome],
    *,
    fit: Callable[[Sequence[Outcome]], Router],
    protocol: Protocol,
    models: Sequence[str] | None = None,
) -> Report:
    """Train by `fit` on parts of the outcomes and judge on the rest, pooled.

    `folds`: each fifth in turn, by a hash of the query, repeats together. `tasks`: each task (first
    tag) in turn, which shows what unheard-of questions get. `split`: what the outcomes call "train"
    and "test". Of two models the one with the lower mean score counts as the weak one.
    Raises `PolicyError` where there is nothing to train or judge on.
    """
    parts = _parts(outcomes, protocol)
    names = tuple(models or score_table(outcomes).models)
    if not any(all(name in row.scores for name in names) for row in outcomes):
        raise PolicyError(f"no outcome has scores for all of {', '.join(names)}")
    names = _weak_first(outcomes, names)
    predicted: list[Floats] = []
    tested: list[Outcome] = []
    num_tests = sum(len(test) for _, test in parts.values())
    for left_out, (train, test) in parts.items():
        complete = [row for row in test if all(name in row.scores for name in names)]
        if not complete:
            continue
        try:
            router = fit(train)
        except PolicyError as error:
            raise PolicyError(f"--protocol {protocol}, without {left_out}: {error}") from None
        for name in names:
            if name not in router.models:
                raise PolicyError(
                    f"the router knows nothing of {name!r}; it knows {', '.join(router.models)}"
                )
        columns = [router.models.index(name) for name in names]
        predicted.append(router.qualities([row.query for row in complete])[:, columns])
        tested += complete
    if not tested:
        raise PolicyError(f"no outcome to judge on has scores for all of {', '.join(names)}")
    lacking = num_tests - len(tested)
    return compare(
        f"Choice among {', '.join(names)}, trained anew: {protocol}",
        names,
        {"Learned": np.concatenate(predicted)},
        score_table(tested, names).scores_QM,
        tasks=[row.tags[0] if row.tags else "" for row in tested],
        cost_QM=_costs(tested, names),
        overlap=f"left out: {lacking:,} that lack a score" if lacking else "",
    )


def _parts(
    outcomes: Sequence[Outcome], protocol: Protocol
) -> dict[str, tuple[list[Outcome], list[Outcome]]]:
    """Return pairs of what to train on and what to judge on, by a name of the latter."""
    if protocol == "split":
        marked = list(outcomes)
        labels = ["train" if row.split != "test" else "test" for row in marked]
        tests = ["test"]
    elif protocol == "tasks":
        labels = [row.tags[0] if row.tags else "" for row in outcomes]
        tests = sorted(set(labels))
    else:
        labels = fold_names(outcomes, num_folds=5)
        tests = sorted(set(labels))
    pairs = {
        test or "(no tag)": (
            [row for row, at in zip(outcomes, labels, strict=True) if at != test],
            [row for row, at in zip(outcomes, labels, strict=True) if at == test],
        )
        for test in tests
    }
    if not all(train and test for train, test in pairs.values()):
        raise PolicyError(
            f"--protocol {protocol}: there is nothing to train or nothing to judge on; the "
            f"outcomes have {', '.join(at or '(no tag)' for at in sorted(set(labels)))}"
        )
    return pairs


def _costs(outcomes: Sequence[Outcome], models: Sequence[str]) -> Floats:
    """Return US dollars [Q, M], a model's mean where a query's is unknown.

    Ones where nothing is known of some model.
    """
    nan = float("nan")
    usd_QM = np.array([[row.costs.get(name, nan) for name in models] for row in outcomes])
    if np.isnan(usd_QM).all(0).any():
        return np.ones_like(usd_QM)
    return np.where(np.isnan(usd_QM), np.nanmean(usd_QM, axis=0), usd_QM)


def _repeats(outcomes: Sequence[Outcome], trained_on: Sequence[Outcome]) -> NDArray[np.bool_]:
    """Return which outcomes' queries (nearly) repeat one that was trained on."""
    first = len(trained_on)
    if not first:
        return np.zeros(len(outcomes), np.bool_)
    alike = near_duplicates([o.query for o in trained_on] + [o.query for o in outcomes])
    repeats = [min(alike.get(first + row, {first})) < first for row in range(len(outcomes))]
    return np.array(repeats, np.bool_)


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
    chosen_Q = chosen_scores(quality_QM, scores_QM)
    num_queries, num_models = scores_QM.shape
    # Between two models of the same mean there is no gap to recover.
    two = num_models == 2 and scores_QM[:, 0].sum() != scores_QM[:, 1].sum()
    traded = trade_curve(quality_QM, scores_QM, cost_QM)
    if two:
        preference_Q = quality_QM[:, 1] - quality_QM[:, 0]
        weak_Q, strong_Q = scores_QM.T
        curve = two_model_curve(preference_Q, weak_Q, strong_Q)

        def resampled(rows: NDArray[np.intp]) -> float:
            return apgr(two_model_curve(preference_Q[rows], weak_Q[rows], strong_Q[rows]))

        interval = bootstrap(resampled, num_queries)
        fold_rows = np.split(np.arange(num_queries), np.cumsum(fold_sizes or [num_queries])[:-1])
        fold_apgrs = tuple(resampled(rows) for rows in fold_rows)
    else:
        curve = traded
    priced = np.ptp(cost_QM) > 0
    usd_Q1 = np.take_along_axis(cost_QM, quality_QM.argmax(1)[:, None], 1)
    predicts = method not in ("random", "per-query oracle")
    return Result(
        method=method,
        accuracy=float(chosen_Q.mean()),
        accuracy_interval=bootstrap(lambda rows: float(chosen_Q[rows].mean()), num_queries),
        curve=curve,
        usd=float(usd_Q1.mean()) if priced else None,
        aiq=aiq(traded, float(cost_QM.max())) if priced else None,
        apgr=apgr(curve) if two else None,
        apgr_interval=interval if two else None,
        fold_apgrs=fold_apgrs if two else (),
        cpt50=cpt(curve, 0.5) if two else None,
        cpt80=cpt(curve, 0.8) if two else None,
        diagram=reliability(quality_QM.ravel(), scores_QM.ravel()) if predicts else None,
        decision_us=decision_us,
    )


def chosen_scores(quality_QM: Floats, scores_QM: Floats) -> Floats:
    """Return the score of the model that is predicted best for each query, [Q]."""
    chosen_Q: Floats = np.take_along_axis(scores_QM, quality_QM.argmax(1)[:, None], 1)[:, 0]
    return chosen_Q


def median_decision_us(router: Router, queries: Sequence[str]) -> float:
    """Return how long one prediction takes, in microseconds."""
    times_s = []
    for text in queries[:NUM_TIMED]:
        start_s = time.perf_counter()
        router.predict(text)
        times_s.append(time.perf_counter() - start_s)
    return float(np.median(times_s)) * 1e6
