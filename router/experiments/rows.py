"""From the ledger's rows to what experiments measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from policies.experiments.analysis import arm_names
from policies.experiments.config import Experiment
from policies.experiments.observations import Observation, Observations
from router.ledger.database import Database
from router.ledger.feedback import Outcome, outcomes
from router.ledger.queries import Period

_OVERLOADED, _SERVER_ERROR, _CLIENT_ERROR = 429, 500, 400


def observe(database: Database, experiment: Experiment, *, since_s: float) -> Observations:
    """Return all that the ledger knows of `experiment` from `since_s` on; blocks."""
    found = outcomes(database, experiment=experiment.name, period=Period(since_s=since_s))
    rows = (observation(outcome) for outcome in found if outcome.row["arm"] is not None)
    return Observations.from_rows(rows, arms=arm_names(experiment))


def observation(outcome: Outcome) -> Observation:
    """Return one request as experiments see it.

    Time and feedback count for answered requests only, cost for all; what the client got wrong
    (status 4xx) is no error of the arm's, being turned away (429) is.
    """
    row = outcome.row
    status = row["status"]
    answered = status < _CLIENT_ERROR
    failed = status >= _SERVER_ERROR or status == _OVERLOADED
    members: Mapping[str, Mapping[str, int]] = row["members"] or {}
    return Observation(
        unit=row["unit"],
        arm=row["arm"],
        propensity=row["propensity"],
        time_s=row["time_s"],
        values={
            "quality": outcome.score,
            "feedback_rate": float(outcome.score is not None) if answered else None,
            "predicted_quality": _predicted(row["scores"] or {}, members),
            "usd": row["usd"],
            "wh": row["wh"],
            "gco2e": row["gco2e"],
            "latency_s": row["latency_s"] if answered else None,
            "ttft_s": row["ttft_s"] if answered else None,
            "tokens": float(sum(sum(tokens.values()) for tokens in members.values())),
            "error_rate": float(failed) if answered or failed else None,
            "escalation_rate": float(_escalated(row["stages"] or ())) if answered else None,
            "prompt_tokens": float(row["prompt_tokens"]),
            "expected_quality": row["expected_quality"],
        },
    )


def _predicted(scores: Mapping[str, float], members: Mapping[str, object]) -> float | None:
    """Return the best prediction for a member that had a hand in the answer."""
    return max((scores[name] for name in members if name in scores), default=None)


def _escalated(stages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether some cascade went on to its second stage."""
    paths = {(stage.get("choice", 0), stage["path"]) for stage in stages}
    return any(
        (stage.get("choice", 0), f"{stage['path']}.1".lstrip(".")) in paths
        for stage in stages
        if stage.get("combinator") == "cascade"
    )
