"""Policy kinds by name: from a specification (JSON/YAML data) to a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from policies.base import ModelFacts, Policy
from policies.budgeted import OPTIONAL_KEYS, build_budgeted
from policies.cascade.chain import load_cascade
from policies.errors import PolicyError
from policies.fixed import Fixed
from policies.frugal import Frugal
from policies.fused import Fused
from policies.plan import Answer, from_json
from policies.routing.build import OPTIONAL, REQUIRED, Clusters, Learned, build_routed

Builder = Callable[[Mapping[str, Any], Path, Mapping[str, ModelFacts]], Policy]


def build_policy(
    spec: Mapping[str, Any], *, folder: Path, models: Mapping[str, ModelFacts]
) -> Policy:
    """Build the policy that `spec` describes: its `kind` and that kind's own keys.

    `folder` is where relative paths start; `models` the pool's models by name. Raises
    `PolicyError` for an unknown kind or key, or a policy that names a model the pool lacks.
    """
    kind = spec.get("kind")
    if kind not in _BUILDERS:
        raise PolicyError(f"kind: {kind!r} is unknown; allowed are {', '.join(sorted(_BUILDERS))}")
    body = {key: value for key, value in spec.items() if key != "kind"}
    policy = _BUILDERS[kind](body, folder, models)
    for name in policy.members():
        if name not in models:
            raise PolicyError(
                f"the policy names the model {name!r}, which the pool lacks; "
                f"it has {', '.join(sorted(models))}"
            )
    return policy


def check_keys(
    kind: str, body: Mapping[str, Any], *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    """Raise `PolicyError` for a missing or unknown key of a policy's specification."""
    for key in required:
        if key not in body:
            raise PolicyError(f"{kind}: the key {key!r} is missing")
    for key in body:
        if key not in (*required, *optional):
            raise PolicyError(
                f"{kind}: the key {key!r} is unknown; allowed are "
                f"{', '.join((*required, *optional))}"
            )


def _fixed(body: Mapping[str, Any], folder: Path, models: Mapping[str, ModelFacts]) -> Policy:  # noqa: ARG001
    check_keys("fixed", body, required=("plan",))
    return Fixed(plan=from_json(body["plan"]))


def _frugal(body: Mapping[str, Any], folder: Path, models: Mapping[str, ModelFacts]) -> Policy:  # noqa: ARG001
    numbers = ("budget_usd_per_1000", "stage_timeout_s")
    check_keys("frugal", body, required=("path",), optional=(*numbers, "scorer"))
    for key in numbers:
        value = body.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise PolicyError(f"frugal.{key}: {value!r} is not a number")
    budget, timeout_s = (body.get(key) for key in numbers)
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise PolicyError(f"frugal.stage_timeout_s: {timeout_s} is not a finite number > 0")
    return Frugal(
        load_cascade(folder / str(body["path"])),
        scorer=str(body.get("scorer", "cascade")),
        budget_usd=None if budget is None else budget / 1000,
        stage_timeout_s=timeout_s,
    )


def _fused(body: Mapping[str, Any], folder: Path, models: Mapping[str, ModelFacts]) -> Policy:
    check_keys("fused", body, required=("answer",), optional=("router", "top", "prior_power"))
    answer = from_json({"answer": body["answer"]})
    top, power, router = body.get("top"), body.get("prior_power", 1.0), body.get("router")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int)):
        raise PolicyError(f"fused.top: {top!r} is not a whole number")
    if isinstance(power, bool) or not isinstance(power, int | float):
        raise PolicyError(f"fused.prior_power: {power!r} is not a number")
    assert isinstance(answer, Answer)
    return Fused(
        answer,
        router=None if router is None else build_policy(router, folder=folder, models=models),
        top=top,
        prior_power=float(power),
    )


def _budgeted(body: Mapping[str, Any], folder: Path, models: Mapping[str, ModelFacts]) -> Policy:
    check_keys("budgeted", body, required=("policy",), optional=OPTIONAL_KEYS)
    return build_budgeted(body, folder, models, build=build_policy)


def _learned(body: Mapping[str, Any], folder: Path, models: Mapping[str, ModelFacts]) -> Policy:
    check_keys("learned", body, required=REQUIRED, optional=OPTIONAL)
    return build_routed(Learned, body, folder, models)


def _clusters(body: Mapping[str, Any], folder: Path, models: Mapping[str, ModelFacts]) -> Policy:
    check_keys("clusters", body, required=REQUIRED, optional=OPTIONAL)
    return build_routed(Clusters, body, folder, models)


_BUILDERS: dict[str, Builder] = {
    "clusters": _clusters,
    "learned": _learned,
    "budgeted": _budgeted,
    "fixed": _fixed,
    "frugal": _frugal,
    "fused": _fused,
}
