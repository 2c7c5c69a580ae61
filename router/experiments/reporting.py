"""An experiment's report from the ledger: the same data for the API, the command and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from policies.experiments.analysis import analyse, trajectory
from policies.experiments.config import Experiment
from policies.experiments.observations import Observations
from policies.experiments.plot import draw
from policies.experiments.report import Report
from router.experiments.rows import observe
from router.experiments.store import State, load
from router.ledger.database import Database

Status: TypeAlias = Literal["not started", "running", "ended"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything known of one experiment; `state` is None if it never ran on this ledger."""

    experiment: Experiment
    status: Status
    state: State | None
    observations: Observations
    report: Report

    def to_json(self) -> dict[str, Any]:
        """Return what `GET /v1/experiments/{name}` and `shoal experiment report --json` show."""
        state = self.state
        return {
            "object": "experiment",
            "status": self.status,
            "started_s": state.started_s if state else None,
            "weights": dict(state.weights) if state else None,
            "stopped": {arm: dict(stop) for arm, stop in state.stopped.items()} if state else {},
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
    )


def _status(experiment: Experiment, state: State | None, now_s: float) -> Status:
    if now_s >= experiment.stop_s:
        return "ended"
    if state is None or now_s < experiment.start_s:
        return "not started"
    return "running"


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """One value for a metrics endpoint."""

    name: str
    labels: Mapping[str, str]
    value: float


def gauges(reports: Iterable[Report]) -> list[Gauge]:
    """Return what metrics show of experiments: units, effects, intervals, p, alarms."""
    found: list[Gauge] = []
    for report in reports:
        base = {"experiment": report.name}
        found.append(
            Gauge(
                name="shoal_experiment_sample_ratio_p",
                labels=base,
                value=report.sample_ratio.p,
            )
        )
        found += [
            Gauge(
                name="shoal_experiment_units",
                labels={**base, "arm": arm.name},
                value=arm.num_units,
            )
            for arm in report.arms
        ]
        for found_effect in (*report.primary, *report.secondary):
            labels = {**base, "arm": found_effect.treatment, "metric": found_effect.metric}
            values = {
                "effect": found_effect.estimate,
                "effect_low": found_effect.low,
                "effect_high": found_effect.high,
                "p": found_effect.p,
            }
            found += [
                Gauge(name=f"shoal_experiment_{key}", labels=labels, value=value)
                for key, value in values.items()
            ]
        found += [
            Gauge(
                name="shoal_experiment_guardrail_breached",
                labels={**base, "arm": guard.treatment, "metric": guard.metric},
                value=float(guard.breached),
            )
            for guard in report.guardrails
        ]
    return found
