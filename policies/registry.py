"""Policy kinds by name: from a specification (JSON/YAML data) to a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from policies.base import ModelFacts, Policy, members_of
from policies.budgeted import OPTIONAL_KEYS, build_budgeted
from policies.building import BuildContext
from policies.cascade.chain import load_cascade
from policies.errors import PolicyError
from policies.frugal import Frugal
from policies.fused import Fused, always
from policies.plan import Answer, from_json
from policies.routing.build import OPTIONAL, REQUIRED, Clusters, Learned, build_routed

Builder = Callable[[Mapping[str, Any], BuildContext], Policy]


def build_policy(
    spec: Mapping[str, Any], *, folder: Path, models: Mapping[str, ModelFacts]
) -> Policy:
    """Build the policy that `spec` describes, by itself: see `build_in`."""
    return build_in(spec, BuildContext(folder=folder, models=models, build=build_in))


def build_in(spec: Mapping[str, Any], context: BuildContext) -> Policy:
    """Build the policy that `spec` describes: its `kind` and that kind's own keys.

    Raises `PolicyError` for an unknown kind or key, or a policy that names a model the pool lacks.
    """
    kind = spec.get("kind")
    if kind not in _BUILDERS:
        raise PolicyError(f"kind: {kind!r} is unknown; allowed are {', '.join(sorted(_BUILDERS))}")
    body = {key: value for key, value in spec.items() if key != "kind"}
    policy = _BUILDERS[kind](body, context)
    for name in members_of(policy):
        if name not in context.models:
            raise PolicyError(
                f"the policy names the model {name!r}, which the pool lacks; "
                f"it has {', '.join(sorted(context.models))}"
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


def _fixed(body: Mapping[str, Any], context: BuildContext) -> Policy:
    check_keys("fixed", body, required=("plan",))
    return always(from_json(body["plan"]), router=context.default)


def _frugal(body: Mapping[str, Any], context: BuildContext) -> Policy:
    numbers = ("budget_usd_per_1000", "stage_timeout_s")
    check_keys("frugal", body, required=("path",), optional=(*numbers, "scorer"))
    for key in numbers:
        value = body.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise PolicyError(f"frugal.{key}: {value!r} is not a number")
    budget, timeout_s = (body.get(key) for key in numbers)
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise PolicyError(f"frugal.stage_timeout_s: {timeout_s} is not a finite number > 0")
    scorer = str(body.get("scorer", "cascade"))
    policy = Frugal(
        load_cascade(context.folder / str(body["path"])),
        scorer=scorer,
        budget_usd=None if budget is None else budget / 1000,
        stage_timeout_s=timeout_s,
        models=context.models,
    )
    context.bring_scorer(scorer, policy.scorer)
    return policy


def _fused(body: Mapping[str, Any], context: BuildContext) -> Policy:
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
        router=None if router is None else context.nested(router),
        top=top,
        prior_power=float(power),
    )


def _budgeted(body: Mapping[str, Any], context: BuildContext) -> Policy:
    check_keys("budgeted", body, required=("policy",), optional=OPTIONAL_KEYS)
    return build_budgeted(body, context)


def _learned(body: Mapping[str, Any], context: BuildContext) -> Policy:
    check_keys("learned", body, required=REQUIRED, optional=OPTIONAL)
    return build_routed(Learned, body, context.folder, context.models)


def _clusters(body: Mapping[str, Any], context: BuildContext) -> Policy:
    check_keys("clusters", body, required=REQUIRED, optional=OPTIONAL)
    return build_routed(Clusters, body, context.folder, context.models)


_BUILDERS: dict[str, Builder] = {
    "clusters": _clusters,
    "learned": _learned,
    "budgeted": _budgeted,
    "fixed": _fixed,
    "frugal": _frugal,
    "fused": _fused,
}
