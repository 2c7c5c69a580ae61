"""Reads experiments from configuration data, refusing what it does not know or what does not fit.

Mutual exclusion: a unit's place in its layer is a salted hash, uniform in [0, 1). Every experiment
of the layer takes one stretch of it, so a unit is in at most one of them. Experiments of different
layers must target different traffic, because one request can follow only one policy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from policies.errors import ExperimentError
from policies.experiments.experiment import Arm, Experiment
from policies.kinds import first_problem

Kind = TypeVar("Kind")


def read_experiments(data: object, *, policies: Collection[str]) -> tuple[Experiment, ...]:
    """Read `{name: experiment}`, with each experiment's arms as `{name: {policy, weight}}`.

    `policies` are the names that arms may use. Raises `ExperimentError` that names the key, the
    value and what is allowed, also where experiments do not go together.
    """
    if not isinstance(data, Mapping):
        raise ExperimentError(f"experiments: {data!r} is not a mapping from names to experiments")
    experiments = tuple(_read_one(str(name), body) for name, body in data.items())
    for experiment in experiments:
        for arm in experiment.arms:
            if arm.policy not in policies:
                raise ExperimentError(
                    f"experiments.{experiment.name}.arms.{arm.name}.policy: {arm.policy!r} is "
                    f"unknown; allowed are {', '.join(sorted(policies))}"
                )
    place(experiments)
    return experiments


def _read_one(name: str, body: object) -> Experiment:
    where = f"experiments.{name}"
    if not isinstance(body, Mapping):
        raise ExperimentError(f"{where}: {body!r} is not a mapping")
    arms = body.get("arms")
    if not isinstance(arms, Mapping) or not all(isinstance(arm, Mapping) for arm in arms.values()):
        raise ExperimentError(
            f"{where}.arms: {arms!r} is not a mapping from names to {{policy, weight}}"
        )
    named = [
        read_as(Arm, {**arm, "name": str(arm_name)}, where=f"{where}.arms.{arm_name}")
        for arm_name, arm in arms.items()
    ]
    return read_as(Experiment, {**body, "name": name, "arms": named}, where=where)


def read_as(kind: type[Kind], body: Mapping[str, Any], *, where: str) -> Kind:
    """Return the dataclass `kind` with the fields of `body`.

    Raises `ExperimentError` that names the key, the value and what is allowed.
    """
    try:
        return TypeAdapter(kind).validate_python(body)
    except ValidationError as error:
        keys = [key for key in signature(kind).parameters if key != "name"]
        raise ExperimentError(first_problem(error, where=where, keys=keys)) from None


Stretch = tuple[float, float]

_TOLERANCE = 1e-9


def place(experiments: Sequence[Experiment]) -> dict[str, Stretch]:
    """Return [start, end) of each experiment in its layer, by name.

    One without an `offset` goes to the first free place, in the order listed: append new
    experiments rather than insert them, so that those that run stay where they are.
    Raises `ExperimentError` for a name used twice, for shares that do not fit beside each other,
    and for layers that compete for the same requests.
    """
    placed: dict[str, Stretch] = {}
    before: list[Experiment] = []
    for experiment in experiments:
        if experiment.name in placed:
            raise ExperimentError(f"experiments: the name {experiment.name!r} is used twice")
        rivals = [other for other in before if _compete(experiment, other)]
        for other in rivals:
            _check_exclusive(experiment, other)
        placed[experiment.name] = _stretch(experiment, [placed[other.name] for other in rivals])
        before.append(experiment)
    return placed


def _compete(a: Experiment, b: Experiment) -> bool:
    """Whether some request could take part in both: same traffic at the same time."""
    return a.target.overlaps(b.target) and a.start_s < b.stop_s and b.start_s < a.stop_s


def _check_exclusive(experiment: Experiment, other: Experiment) -> None:
    if experiment.layer != other.layer:
        raise ExperimentError(
            f"experiments.{experiment.name}.layer: {experiment.layer!r} overlaps the layer "
            f"{other.layer!r} of {other.name!r}: both target the same requests. Put them into one "
            "layer, or give them different targets or times"
        )
    if experiment.unit != other.unit:
        raise ExperimentError(
            f"experiments.{experiment.name}.unit: {experiment.unit!r}, but {other.name!r} in the "
            f"same layer splits by {other.unit!r}; a layer has one unit"
        )


def _stretch(experiment: Experiment, taken: Sequence[Stretch]) -> Stretch:
    offsets = (
        [0.0, *sorted(end for _, end in taken)]
        if experiment.offset is None
        else [experiment.offset]
    )
    for offset in offsets:
        start, end = offset, offset + experiment.traffic
        fits = end <= 1 + _TOLERANCE
        if fits and all(end <= s + _TOLERANCE or e <= start + _TOLERANCE for s, e in taken):
            return start, end
    used = ", ".join(f"[{start:g}, {end:g})" for start, end in sorted(taken))
    raise ExperimentError(
        f"experiments.{experiment.name}.traffic: {experiment.traffic:g} does not fit into the "
        f"layer {experiment.layer!r}, where {used} is taken; shares of competing experiments "
        "may sum to 1 at most and must not overlap"
    )
