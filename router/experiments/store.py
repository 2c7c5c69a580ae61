"""What must survive a restart and be the same on every replica: one row per experiment.

Its fingerprint (what must not change), the history of its weights, and which arms a guardrail
stopped. All functions block; call them off the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from policies.errors import ExperimentError
from policies.experiments.analysis import WeightsSince
from policies.experiments.experiment import Experiment
from router.ledger.database import Database, writing
from router.ledger.schema import EXPERIMENTS, REQUESTS

_LOCK = 5_350_003


@dataclass(frozen=True, kw_only=True)
class State:
    """Where an experiment stands. Times are Unix seconds; `stopped` says when and why, by arm."""

    started_s: float
    checked_s: float
    allocations: tuple[WeightsSince, ...]
    stopped: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights in force."""
        return self.allocations[-1].weights

    @property
    def stopped_s(self) -> dict[str, float]:
        """When each stopped arm was stopped."""
        return {arm: float(stop["time_s"]) for arm, stop in self.stopped.items()}


def register(
    database: Database, experiment: Experiment, *, fingerprint: str, now_s: float
) -> State:
    """Start `experiment`, or take it up again where it was.

    Changed weights take effect and are remembered. Raises `ExperimentError` if anything else
    changed since the experiment has data.
    """
    with writing(database, lock=_LOCK) as connection:
        row = _row(connection, experiment.name)
        if row is not None and row["fingerprint"] != fingerprint:
            if _has_data(connection, experiment.name):
                raise ExperimentError(
                    f"experiments.{experiment.name}: its arms, policies, unit, target, holdout, "
                    "salt or primary metric changed while it has data, which would mix two "
                    "experiments; give the changed one a new name, or change it back"
                )
            connection.execute(sa.delete(EXPERIMENTS).where(_named(experiment.name)))
            row = None
        configured = {arm.name: arm.weight for arm in experiment.arms}
        if row is None:
            fresh = State(
                started_s=now_s,
                checked_s=0.0,
                allocations=(WeightsSince(time_s=now_s, weights=configured),),
            )
            connection.execute(
                sa.insert(EXPERIMENTS).values(
                    name=experiment.name, fingerprint=fingerprint, **asdict(fresh)
                )
            )
            return fresh
        state = _state(row)
        if experiment.allocation.kind == "fixed" and dict(state.weights) != configured:
            state = _moved(state, configured, now_s)
            _update(connection, experiment.name, state)
        return state


def load(database: Database, name: str) -> State | None:
    """Return the state of the experiment `name`, None if it never ran on this ledger."""
    row = database.row(sa.select(EXPERIMENTS).where(_named(name)))
    return None if row is None else _state(row)


def claim_check(database: Database, name: str, *, now_s: float, interval_s: float) -> bool:
    """Return whether the caller is to check `name` now: one replica per interval is."""
    with writing(database) as connection:
        claimed = connection.execute(
            sa.update(EXPERIMENTS)
            .where(_named(name), EXPERIMENTS.c.checked_s <= now_s - interval_s)
            .values(checked_s=now_s)
        )
        return claimed.rowcount == 1


def stop_arm(
    database: Database, name: str, arm: str, *, reason: Mapping[str, Any], now_s: float
) -> None:
    """Stop `arm` for good; its units get the control's policy. Stopping twice changes nothing."""
    with writing(database, lock=_LOCK) as connection:
        row = _row(connection, name)
        if row is not None and arm not in (row["stopped"] or {}):
            state = _state(row)
            stopped = {**state.stopped, arm: {"time_s": now_s, **reason}}
            _update(connection, name, replace(state, stopped=stopped))


def move_weights(
    database: Database, name: str, weights: Mapping[str, float], *, now_s: float
) -> None:
    """Put new weights in force; stopped arms keep none."""
    with writing(database, lock=_LOCK) as connection:
        row = _row(connection, name)
        if row is not None:
            state = _state(row)
            kept = {arm: 0.0 if arm in state.stopped else w for arm, w in weights.items()}
            _update(connection, name, _moved(state, kept, now_s))


def _moved(state: State, weights: Mapping[str, float], now_s: float) -> State:
    since = WeightsSince(time_s=now_s, weights=dict(weights))
    return replace(state, allocations=(*state.allocations, since))


def _has_data(connection: sa.Connection, name: str) -> bool:
    found = sa.select(REQUESTS.c.request_id).where(REQUESTS.c.experiment == name).limit(1)
    return connection.execute(found).first() is not None


def _row(connection: sa.Connection, name: str) -> Mapping[str, Any] | None:
    row = connection.execute(sa.select(EXPERIMENTS).where(_named(name))).mappings().first()
    return None if row is None else dict(row)


def _update(connection: sa.Connection, name: str, state: State) -> None:
    connection.execute(sa.update(EXPERIMENTS).where(_named(name)).values(**asdict(state)))


def _named(name: str) -> sa.ColumnElement[bool]:
    return EXPERIMENTS.c.name == name


def _state(row: Mapping[str, Any]) -> State:
    return State(
        started_s=row["started_s"],
        checked_s=row["checked_s"],
        allocations=tuple(
            WeightsSince(time_s=since["time_s"], weights=since["weights"])
            for since in row["allocations"]
        ),
        stopped=row["stopped"] or {},
    )
