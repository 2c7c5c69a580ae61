"""The ledger's experiment rows as a log that policies can be replayed on."""

from __future__ import annotations

from collections.abc import Mapping

from policies.base import Query
from policies.errors import ExperimentError
from policies.experiments.config import Experiment
from policies.experiments.replay import LoggedRequest
from policies.fixed import ignores_queries
from router.catalog.catalog import Catalog
from router.experiments.store import State, load
from router.ledger.database import Database
from router.ledger.feedback import Outcome, outcomes


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
        outcome
        for outcome in outcomes(database, experiment=experiment.name)
        if outcome.row["arm"] is not None and outcome.row["status"] < 400 and outcome.row["plan"]
    ]
    if not found:
        raise ExperimentError(f"replay: the experiment {experiment.name!r} has no answers yet")
    names = {target, *(arm.policy for arm in experiment.arms)}
    reading = sorted(n for n in names if not ignores_queries(catalog.policies[n]))
    if reading and any(outcome.row["query_text"] is None for outcome in found):
        raise ExperimentError(
            f"replay: {', '.join(reading)} reads the query, but the ledger kept no text; "
            "set ledger.keep_text before the requests come, or replay on outcomes"
        )
    return [_request(outcome, experiment, state) for outcome in found]


def _request(outcome: Outcome, experiment: Experiment, state: State) -> LoggedRequest:
    row = outcome.row
    return LoggedRequest(
        query=Query(text=row["query_text"] or "", prompt_tokens=row["prompt_tokens"]),
        chances=_chances(experiment, state, row["time_s"]),
        policy=row["policy"],
        plan=row["plan"],
        usd=row["usd"],
        score=outcome.score,
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
