"""Measures a router that is already trained."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from policies.errors import PolicyError
from policies.evaluation.harness import Report, judge
from policies.outcomes import Outcome, score_table
from policies.routing.calibration import Reliability, reliability
from policies.routing.router import Router


def evaluate_router(
    router: Router, outcomes: Sequence[Outcome], *, models: Sequence[str] | None = None
) -> tuple[Report, Reliability]:
    """Judge `router`'s choice among `models` (default: all it knows) on queries scored for all.

    Returns the report and the heads' reliability diagram. Raises `PolicyError` for a model the
    router does not know or outcomes without a query that has all scores.
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
    scores_QM = scores_QM[complete]
    rows = [outcomes[q] for q in np.flatnonzero(complete).tolist()]
    queries = [row.query for row in rows]
    columns = [router.models.index(name) for name in names]
    tasks = np.array([row.tags[0] if row.tags else "" for row in rows])
    task_QM = np.empty_like(scores_QM)
    for task in np.unique(tasks):
        task_QM[tasks == task] = scores_QM[tasks == task].mean(0)
    learned_QM = router.qualities(queries)[:, columns]
    predictions = {
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
        num_removed=0,
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


def _time_s(router: Router, query: str) -> float:
    start_s = time.perf_counter()
    router.predict(query)
    return time.perf_counter() - start_s
