"""Measures a router that is already trained."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies.errors import PolicyError
from policies.evaluation.harness import Report, judge
from policies.evaluation.overlap import near_duplicates
from policies.outcomes import Outcome, content_sha256, score_table
from policies.routing.calibration import Reliability, reliability
from policies.routing.router import Router


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
    times_s = [_time_s(router, query) for query in queries[:500]]
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
                decision_us=float(np.median(times_s)) * 1e6 if name == "Learned" else None,
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


def _time_s(router: Router, query: str) -> float:
    start_s = time.perf_counter()
    router.predict(query)
    return time.perf_counter() - start_s
