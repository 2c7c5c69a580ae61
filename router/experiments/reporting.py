"""An experiment's report from the ledger: the same data for the API, the command and metrics."""

from __future__ import annotations

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
