"""A policy that takes another one's predictions and chooses what is worth its price."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from policies.base import Decision, ModelFacts, Policy, Query
from policies.budget.controller import Controller
from policies.budget.prices import BudgetTarget
from policies.carbon.settings import LiveModels
from policies.errors import PolicyError
from policies.footprint import Footprint, Limits
from policies.kinds import Settings
from policies.laws.file import LAWS_FILE, read_laws
from policies.laws.scaling import EnsembleLaw
from policies.plan import Answer, Name, Plan
from policies.registry import BuildContext, PolicyKind


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


class BudgetedSettings(Settings):
    """The keys of `kind: budgeted`."""

    policy: Mapping[str, Any] = Field(description="The specification of the wrapped policy.")
    targets: tuple[BudgetTarget, ...] = Field((), strict=False)
    window_hours: float = Field(24, gt=0, description="What a target is averaged over.")
    quality_floor: float | None = Field(None, gt=0, le=1)
    max_latency_s: float | None = Field(None, gt=0)
    max_usd: float | None = Field(None, gt=0)
    max_wh: float | None = Field(None, gt=0)
    max_gco2e: float | None = Field(None, gt=0)
    fuse: tuple[Annotated[tuple[Name, ...], Field(strict=False, min_length=1)], ...] = Field(
        (), strict=False, description="Groups of models that may be fused."
    )
    laws: str | None = Field(
        None, description="The pool's ensemble law; default: laws.npz, if there is one."
    )
    expected_output_tokens: int = Field(
        128, ge=1, description="The first guess of an answer's length."
    )


def make_controller(
    settings: BudgetedSettings,
    models: Mapping[str, ModelFacts],
    *,
    folder: Path,
    clock: Callable[[], float] = time.time,
) -> Controller:
    """Return the controller that `settings` describe, for the models of the pool in `folder`.

    Raises `PolicyError` for a group that names a model which the pool lacks.
    """
    for name in (name for group in settings.fuse for name in group):
        if name not in models:
            raise PolicyError(
                f"budgeted.fuse: {name!r} is unknown; the pool has {', '.join(sorted(models))}"
            )
    return Controller(
        models=models,
        clock=clock,
        targets=settings.targets,
        law=_law(settings.laws, folder),
        groups=settings.fuse,
        limits=Limits.of(settings),
        expected_output_tokens=settings.expected_output_tokens,
        window_s=settings.window_hours * 3600,
        announced=models.announced_gco2e_per_kwh if isinstance(models, LiveModels) else None,
    )


def _build(settings: BudgetedSettings, context: BuildContext) -> Policy:
    policy = context.nested(settings.policy)
    controller = make_controller(settings, context.models, folder=context.folder)
    context.controllers.append(controller)
    return Budgeted(policy=policy, controller=controller, groups=settings.fuse)


def _law(name: str | None, folder: Path) -> EnsembleLaw | None:
    file = folder / (name or LAWS_FILE)
    if name is None and not file.is_file():
        return None
    return read_laws(file).ensemble_error


KIND = PolicyKind(settings=BudgetedSettings, build=_build)
