"""Reads experiments from configuration data (YAML or JSON), refusing what it does not know."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from policies.errors import ExperimentError
from policies.experiments.config import Experiment
from policies.experiments.layers import place

_ADAPTER = TypeAdapter(Experiment)


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
    named = [{**arm, "name": str(arm_name)} for arm_name, arm in arms.items()]
    try:
        return _ADAPTER.validate_python({**body, "name": name, "arms": named})
    except ValidationError as failure:
        raise refusal(where, failure, arms=named) from None


def refusal(
    where: str, failure: ValidationError, *, arms: Sequence[Mapping[str, Any]] = ()
) -> ExperimentError:
    """Return what is wrong first, in this project's words: the key, the value, what is allowed."""
    error = failure.errors(include_url=False)[0]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ExperimentError):
        return cause
    path = [str(part) for part in error["loc"]]
    if path[:1] == ["arms"] and len(path) > 1:
        path[1] = arms[int(path[1])]["name"]
    key = ".".join((where, *path))
    if error["type"] == "unexpected_keyword_argument":
        return ExperimentError(f"{key}: this key is unknown")
    if error["type"].startswith("missing"):
        return ExperimentError(f"{key}: this key is missing")
    return ExperimentError(f"{key}: {error['input']!r}; {error['msg']}")
