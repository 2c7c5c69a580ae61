"""From the ledger's rows to what an experiment found, and to a log for replays of policies.

The report is the same for the API, the command and the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import sqlalchemy as sa

from policies.base import Query
from policies.errors import ExperimentError
from policies.experiments.analysis import analyse, arm_names, trajectory
from policies.experiments.effects import Observation, Observations
from policies.experiments.experiment import Experiment, Segment
from policies.experiments.replay import LoggedRequest
from policies.experiments.report import Comparison, Report, draw
from policies.fixed import ignores_queries
from policies.tables import text_table
from router.catalog.catalog import Catalog
from router.experiments.store import State, load
from router.ledger.database import Database
from router.ledger.feedback import RatedRequest, rated_requests
from router.ledger.queries import Period
from router.ledger.schema import REQUESTS
from router.record import mirrored_request_id

Status: TypeAlias = Literal["not started", "running", "ended"]

_METRICS = (
    *("quality", "feedback_rate", "usd", "wh", "gco2e", "latency_s", "ttft_s", "tokens"),
    *("error_rate", "escalation_rate", "predicted_quality", "grade", "judged_quality"),
)
_COMPARED = ("metric", "arm", "difference", "relative", "interval", "p", "power", "")

_OVERLOADED, _SERVER_ERROR, _CLIENT_ERROR = 429, 500, 400


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything known of one experiment; `state` is None if it never ran on this ledger.

    `judging_usd` is what its judge has cost, which is in no arm's costs.
    """

    experiment: Experiment
    status: Status
    state: State | None
    observations: Observations
    report: Report
    judging_usd: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return what `GET /v1/experiments/{name}` and `shoal experiment report --json` show."""
        state = self.state
        return {
            "object": "experiment",
            "status": self.status,
            "started_s": state.started_s if state else None,
            "weights": dict(state.weights) if state else None,
            "stopped": {arm: dict(stop) for arm, stop in state.stopped.items()} if state else {},
            "judging_usd": self.judging_usd,
            **self.report.to_json(),
        }

    def plot(self) -> bytes:
        """Return the confidence sequences over time as a PNG."""
        paths = {
            arm.name: trajectory(self.experiment, self.observations, arm)
            for arm in self.experiment.treatments
        }
        return draw(self.experiment, self.report, paths)


def summarise(database: Database, experiment: Experiment, *, now_s: float) -> Summary:
    """Read the ledger and analyse; blocks for about a second per 30,000 requests."""
    state = load(database, experiment.name)
    seen = observe(database, experiment, since_s=state.started_s if state else 0.0)
    report = analyse(
        experiment,
        seen,
        allocations=state.allocations if state else (),
        stopped_s=state.stopped_s if state else None,
    )
    return Summary(
        experiment=experiment,
        status=_status(experiment, state, now_s),
        state=state,
        observations=seen,
        report=report,
        judging_usd=_judging_usd(database, experiment),
    )


def _judging_usd(database: Database, experiment: Experiment) -> float:
    """Return what the judge of `experiment` has cost."""
    if experiment.judge is None:
        return 0.0
    judged = REQUESTS.alias("judged")
    prefix = mirrored_request_id(experiment.judge, "")
    graded_id = sa.literal(prefix).concat(REQUESTS.c.request_id)
    total = (
        sa.select(sa.func.coalesce(sa.func.sum(judged.c.usd), 0.0))
        .join_from(REQUESTS, judged, judged.c.request_id == graded_id)
        .where(REQUESTS.c.experiment == experiment.name)
    )
    with database.connect() as connection:
        return float(connection.execute(total).scalar_one())


def _status(experiment: Experiment, state: State | None, now_s: float) -> Status:
    if now_s >= experiment.stop_s:
        return "ended"
    if state is None or now_s < experiment.start_s:
        return "not started"
    return "running"


def as_text(summary: Summary) -> str:
    """Return the report for a terminal."""
    report = summary.report
    metrics = [
        metric
        for metric in (*_METRICS, *summary.experiment.metrics)
        if any(metric in arm.means for arm in report.arms)
    ]
    arms = [
        (
            arm.name + (" (stopped)" if arm.stopped else ""),
            arm.policy,
            f"{arm.num_units:,}",
            f"{arm.num_requests:,}",
            *(f"{arm.means[m].mean:.4g}" if m in arm.means else "-" for m in metrics),
        )
        for arm in report.arms
    ]
    lines = [
        f"{report.name}: {summary.status}; {report.num_requests:,} requests of "
        f"{report.num_units:,} {report.unit}s"
        + (f"; {report.num_crossed:,} left out (moved arms)" if report.num_crossed else ""),
        "",
        text_table([("arm", "policy", f"{report.unit}s", "requests", *metrics), *arms], num_left=2),
        "",
        text_table([_COMPARED, *map(_compared, (*report.primary, *report.secondary))], num_left=2),
    ]
    if report.segments:
        named = ("segment", "part", *_COMPARED)
        parts = [(f.segment or "", f.part or "", *_compared(f)) for f in report.segments]
        lines += ["", text_table([named, *parts], num_left=4)]
    if report.guardrails:
        guards = [
            (
                guard.treatment,
                guard.metric,
                _number(guard.harm),
                _number(guard.harm_low),
                f"{guard.limit:.4g}",
                "BREACHED" if guard.breached else "ok",
            )
            for guard in report.guardrails
        ]
        head = ("guardrail", "metric", "harm", "at least", "allowed", "")
        lines += ["", text_table([head, *guards], num_left=2)]
    ratio = report.sample_ratio
    seen = ", ".join(
        f"{arm} {count:,} of {want:,.0f} expected"
        for arm, count, want in zip(ratio.arms, ratio.observed, ratio.expected, strict=True)
    )
    alarm = "MISMATCH" if ratio.alarm else "ok"
    lines += ["", f"sample ratio: {alarm} (p = {ratio.p:.3g}; {seen})"]
    kept = {found.variance_kept for found in report.primary if found.variance_kept < 1}
    if kept:
        lines.append(f"CUPED leaves {min(kept):.0%} of the variance of {report.primary_metric}")
    if summary.experiment.judge is not None:
        num = int(
            np.count_nonzero(~np.isnan(summary.observations.columns.get("grade", np.zeros(0))))
        )
        lines.append(
            f"judge: {summary.experiment.judge} graded {num:,} answers for "
            f"{summary.judging_usd:.4g} USD, which are in no arm's costs"
        )
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join([*lines, "", report.recommendation])


def _compared(found: Comparison) -> tuple[str, ...]:
    verdict = {True: "better", False: "worse", None: ""}[found.better]
    return (
        found.metric,
        found.treatment,
        _number(found.estimate),
        f"{found.relative:+.1%}" if math.isfinite(found.relative) else "-",
        f"[{_number(found.low)}, {_number(found.high)}]",
        f"{found.p:.3g}" if found.p else "<1e-300",
        f"{found.power:.0%}",
        verdict,
    )


def _number(value: float) -> str:
    return f"{value:+.4g}" if math.isfinite(value) else "-"


def observe(database: Database, experiment: Experiment, *, since_s: float) -> Observations:
    """Return all that the ledger knows of `experiment` from `since_s` on; blocks."""
    found = rated_requests(
        database,
        experiment=experiment.name,
        period=Period(since_s=since_s),
        judge=experiment.judge,
    )
    rows = (observation(request, experiment) for request in found if request.row["arm"] is not None)
    return Observations.from_rows(rows, arms=arm_names(experiment))


def observation(request: RatedRequest, experiment: Experiment) -> Observation:
    """Return one request as experiments see it.

    Time and feedback count for answered requests only, cost for all; what the client got wrong
    (status 4xx) is no error of the arm's, being turned away (429) is.
    """
    row = request.row
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
            "quality": request.score,
            "grade": request.grade,
            "feedback_rate": float(request.score is not None) if answered else None,
            "predicted_quality": predicted_quality(row["scores"] or {}, members),
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
            **{
                name: request.metrics.get(name)
                for name, own in experiment.metrics.items()
                if own.kind == "real" or request.metrics.get(name) in (None, 0, 1)
            },
        },
        parts={name: _PARTS[name](row) for name in experiment.segments},
    )


def _domain(row: Mapping[str, Any]) -> str:
    """Return the member that the policy thought best; a chunk's name is its domain's."""
    scores = row["scores"] or {}
    return max(scores, key=scores.__getitem__) if scores else "not predicted"


def _length(row: Mapping[str, Any]) -> str:
    bounds = ((100, "below 100 tokens"), (1000, "100 to 999 tokens"))
    most = (name for limit, name in bounds if row["prompt_tokens"] < limit)
    return next(most, "1,000 tokens and more")


_PARTS: Mapping[Segment, Callable[[Mapping[str, Any]], str]] = {
    "key": lambda row: row["key_id"] or "no key",
    "domain": _domain,
    "length": _length,
    "language": lambda row: row["language"] or "not told",
}


def predicted_quality(scores: Mapping[str, float], members: Mapping[str, object]) -> float | None:
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


def read_log(
    database: Database, experiment: Experiment, catalog: Catalog, *, target: str
) -> list[LoggedRequest]:
    """Return the answered requests of `experiment` that tell something of the policy `target`.

    Raises `ExperimentError` if there are none, or if they were kept without text and some policy
    reads it.
    """
    state = load(database, experiment.name)
    if state is None:
        raise ExperimentError(f"replay: the experiment {experiment.name!r} never ran here")
    found = [
        request
        for request in rated_requests(database, experiment=experiment.name)
        if request.row["arm"] is not None and request.row["status"] < 400 and request.row["plan"]
    ]
    if not found:
        raise ExperimentError(f"replay: the experiment {experiment.name!r} has no answers yet")
    names = {target, *(arm.policy for arm in experiment.arms)}
    reading = sorted(n for n in names if not ignores_queries(catalog.policies[n]))
    if reading and any(request.row["query_text"] is None for request in found):
        raise ExperimentError(
            f"replay: {', '.join(reading)} reads the query, but the ledger kept no text; "
            "set ledger.keep_text before the requests come, or replay on outcomes"
        )
    return [_request(request, experiment, state) for request in found]


def _request(request: RatedRequest, experiment: Experiment, state: State) -> LoggedRequest:
    row = request.row
    return LoggedRequest(
        query=Query(text=row["query_text"] or "", prompt_tokens=row["prompt_tokens"]),
        chances=_chances(experiment, state, row["time_s"]),
        policy=row["policy"],
        plan=row["plan"],
        usd=row["usd"],
        score=request.score,
    )


def _chances(experiment: Experiment, state: State, time_s: float) -> Mapping[str, float]:
    """Return the probability of each policy at that time, the holdout and stopped arms included."""
    weights = next(
        (since.weights for since in reversed(state.allocations) if since.time_s <= time_s),
        state.allocations[0].weights,
    )
    control = experiment.control_arm.policy
    chances = {control: experiment.holdout}
    for arm in experiment.arms:
        stopped = time_s >= state.stopped_s.get(arm.name, float("inf"))
        # Requests of a stopped arm count for no arm, so they are not in the log either.
        share = 0.0 if stopped else (1 - experiment.holdout) * weights[arm.name]
        chances[arm.policy] = chances.get(arm.policy, 0.0) + share
    total = sum(chances.values())
    return {name: share / total for name, share in chances.items() if share > 0}
