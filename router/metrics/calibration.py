"""Whether the router's predictions still hold: predicted quality against users' scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from router.ledger.database import Database
from router.ledger.queries import ANSWERED, SERVED
from router.ledger.schema import FEEDBACK, REQUESTS
from router.metrics import families as f
from router.metrics.family import Series

# As many rated answers are looked at, the latest ones.
_LAST = 2000
_NUM_BINS = 10

_RATED = (
    sa.select(REQUESTS.c.policy, REQUESTS.c.scores, REQUESTS.c.members, FEEDBACK.c.score)
    .join_from(FEEDBACK, REQUESTS, REQUESTS.c.request_id == FEEDBACK.c.request_id)
    .where(
        FEEDBACK.c.score.is_not(None),
        ANSWERED,
        SERVED,
    )
    .order_by(FEEDBACK.c.time_s.desc())
    .limit(_LAST)
)


@dataclass(kw_only=True)
class _Rated:
    """One policy's rated answers: their scores, and (prediction, score) where one was made."""

    scores: list[float] = field(default_factory=list)
    pairs: list[tuple[float, float]] = field(default_factory=list)


def calibration_gauges(database: Database) -> dict[Series, float]:
    """Return users' mean score and the predictions' error per policy; blocks."""
    policies: dict[str, _Rated] = defaultdict(_Rated)
    with database.connect() as connection:
        for policy, scores, members, score in connection.execute(_RATED):
            rated = policies[policy or f.NONE]
            rated.scores.append(score)
            predicted = _predicted(scores or {}, members or {})
            if predicted is not None:
                rated.pairs.append((predicted, score))
    found: dict[Series, float] = {}
    for policy, rated in policies.items():
        found[f.FEEDBACK_SCORE.series(policy)] = sum(rated.scores) / len(rated.scores)
        found[f.FEEDBACK_ANSWERS.series(policy)] = float(len(rated.scores))
        if rated.pairs:
            found[f.CALIBRATION_ANSWERS.series(policy)] = float(len(rated.pairs))
            found[f.CALIBRATION_BIAS.series(policy)] = _gap(rated.pairs)
            found[f.CALIBRATION_ERROR.series(policy)] = expected_error(rated.pairs)
    return found


def expected_error(pairs: list[tuple[float, float]]) -> float:
    """Return the expected calibration error of (prediction, outcome) pairs, in [0, 1].

    Predictions are put into ten bins of equal width; the error is the mean of the bins' gaps
    between mean prediction and mean outcome, weighted by their sizes (Naeini et al. 2015; Guo et
    al. 2017, equation 3).
    """
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        bins[min(int(pair[0] * _NUM_BINS), _NUM_BINS - 1)].append(pair)
    return sum(abs(_gap(found)) * len(found) for found in bins.values()) / len(pairs)


def _gap(pairs: list[tuple[float, float]]) -> float:
    return sum(predicted - score for predicted, score in pairs) / len(pairs)


def _predicted(scores: Mapping[str, float], members: Mapping[str, Any]) -> float | None:
    """Return the best prediction for a model that had a hand in the answer."""
    return max((scores[name] for name in members if name in scores), default=None)
