"""A policy that takes another one's predictions and chooses what is worth its price."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from policies.base import Decision, ModelFacts, Policy, Query
from policies.budget.controller import Controller
from policies.budget.targets import Target
from policies.building import BuildContext
from policies.carbon.live import LiveModels
from policies.errors import PolicyError
from policies.footprint import Footprint
from policies.laws.ensemble import EnsembleLaw
from policies.laws.file import read_laws
from policies.limits import Limits
from policies.plan import Answer, Plan

LAWS_FILE = "laws.json"


class Budgeted(Policy):
    """`policy` decides, `controller` trims or grows its plan to what the budget is worth."""

    def __init__(
        self, *, policy: Policy, controller: Controller, groups: Sequence[Sequence[str]] = ()
    ) -> None:
        """Wrap `policy`; `groups` are the models that the controller may fuse."""
        self.policy = policy
        self.controller = controller
        self._groups = tuple(tuple(group) for group in groups)

    def decide(self, query: Query) -> Decision:
        """Return the wrapped policy's decision with the plan that is worth its price."""
        return self.controller.choose(query, self.policy.decide(query))

    def plans(self) -> Iterable[Plan]:
        """Return the wrapped policy's plans, and each group fused, in the ways that these fuse."""
        own = tuple(self.policy.plans())
        yield from own
        for group in self._groups:
            yield Answer(members=group)
            for plan in own:
                if isinstance(plan, Answer) and plan.rule != "contrastive":
                    yield replace(plan, members=group, weights=None)

    def settle(self, query: Query, decision: Decision, cost: Footprint) -> None:
        """Tell the controller what a request really was."""
        self.controller.observe(query, decision, cost)


def build_budgeted(
    body: Mapping[str, Any],
    context: BuildContext,
    *,
    clock: Callable[[], float] = time.time,
) -> Budgeted:
    """Build from a specification's keys.

    `policy` (required) is the wrapped policy's specification; `targets` a list of
    {resource: usd|wh|gco2e, amount, per: hour|1000_requests}; `window_hours` what a target is
    averaged over (24); `quality_floor`, `max_latency_s`, `max_usd`, `max_wh`, `max_gco2e` hold for
    every request; `fuse` lists groups of models that may be fused; `laws` names the file with the
    pool's ensemble law (default: laws.json, if there is one); `expected_output_tokens` (128) is
    the first guess of an answer's length. Raises `PolicyError`.
    """
    inner = body["policy"]
    if not isinstance(inner, Mapping):
        raise PolicyError(f"budgeted.policy: {inner!r} is not a policy's specification")
    models = context.models
    groups = _groups(body.get("fuse", []), models)
    policy = context.nested(inner)
    controller = Controller(
        models=models,
        clock=clock,
        targets=_targets(body.get("targets", [])),
        law=_law(body.get("laws"), context.folder),
        groups=groups,
        limits=Limits(
            max_usd=_number(body, "max_usd"),
            max_wh=_number(body, "max_wh"),
            max_gco2e=_number(body, "max_gco2e"),
            max_latency_s=_number(body, "max_latency_s"),
            quality_floor=_number(body, "quality_floor", most=1.0),
        ),
        expected_output_tokens=round(_number(body, "expected_output_tokens") or 128),
        window_s=(_number(body, "window_hours") or 24) * 3600,
        announced=models.announced_gco2e_per_kwh if isinstance(models, LiveModels) else None,
    )
    context.controllers.append(controller)
    return Budgeted(policy=policy, controller=controller, groups=groups)


OPTIONAL_KEYS = (
    "targets",
    "window_hours",
    "quality_floor",
    "max_latency_s",
    "max_usd",
    "max_wh",
    "max_gco2e",
    "fuse",
    "laws",
    "expected_output_tokens",
)


def _targets(data: object) -> tuple[Target, ...]:
    if not isinstance(data, list):
        raise PolicyError(f"budgeted.targets: {data!r} is not a list")
    targets = []
    for item in data:
        if not isinstance(item, Mapping) or not {"resource", "amount"} <= set(item):
            raise PolicyError(f"budgeted.targets: {item!r} needs the keys resource and amount")
        unknown = sorted(set(item) - {"resource", "amount", "per"})
        if unknown:
            raise PolicyError(
                f"budgeted.targets: the key {unknown[0]!r} is unknown; "
                "allowed are resource, amount, per"
            )
        targets.append(Target(**item))
    return tuple(targets)


def _groups(data: object, models: Mapping[str, ModelFacts]) -> tuple[tuple[str, ...], ...]:
    if not isinstance(data, list) or not all(isinstance(group, list) for group in data):
        raise PolicyError(f"budgeted.fuse: {data!r} is not a list of lists of models")
    for name in (name for group in data for name in group):
        if name not in models:
            raise PolicyError(
                f"budgeted.fuse: {name!r} is unknown; the pool has {', '.join(sorted(models))}"
            )
    return tuple(tuple(group) for group in data)


def _law(name: object, folder: Path) -> EnsembleLaw | None:
    file = folder / (LAWS_FILE if name is None else str(name))
    if name is None and not file.is_file():
        return None
    return read_laws(file).ensemble_error


def _number(body: Mapping[str, Any], key: str, *, most: float = float("inf")) -> float | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        allowed = "a number above zero" if most == float("inf") else f"a number in (0, {most:g}]"
        raise PolicyError(f"budgeted.{key}: {value!r} is not {allowed}")
    return float(value)
