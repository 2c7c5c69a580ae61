"""Policies that always choose the same plan: a single model, a fixed fusion, a fixed cascade."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.base import Decision, Policy, Query
from policies.fused import needs_prior, with_prior
from policies.kinds import Settings
from policies.plan import Plan, PlanField, members
from policies.registry import BuildContext, PolicyKind


@dataclass(frozen=True, kw_only=True)
class Fixed(Policy):
    """Always `plan`, as it is."""

    plan: Plan

    def decide(self, query: Query) -> Decision:  # noqa: ARG002 - the contract's signature
        """Return `plan`, whatever the query."""
        return Decision(plan=self.plan, reason="fixed plan")

    def plans(self) -> Iterable[Plan]:
        """Return `plan`."""
        return (self.plan,)


class Primed(Policy):
    """Always `plan`, its open weights filled in with what `router` predicts for the query.

    A router that predicts nothing leaves them uniform.
    """

    def __init__(self, plan: Plan, *, router: Policy) -> None:
        self._plan = plan
        self._router = router

    def decide(self, query: Query) -> Decision:
        """Return the plan with the weights for `query`."""
        scores = self._router.predict(query)
        named = members(self._plan)
        return Decision(
            plan=with_prior(self._plan, scores),
            scores={name: score for name, score in scores.items() if name in named},
            reason="fixed plan, weights by the default policy",
        )

    def plans(self) -> Iterable[Plan]:
        """Return the plan, its weights open."""
        return (self._plan,)


def always(plan: Plan, *, router: Policy | None) -> Policy:
    """Return the policy that always takes `plan`, open weights filled in by `router`."""
    return Primed(plan, router=router) if router and needs_prior(plan) else Fixed(plan=plan)


def ignores_queries(policy: Policy) -> bool:
    """Return whether `policy` is known to choose the same plan whatever is asked."""
    return isinstance(policy, Fixed)


class FixedSettings(Settings):
    """`plan` is what it always chooses, as JSON (see `policies.plan`)."""

    plan: PlanField


def _build(settings: FixedSettings, context: BuildContext) -> Policy:
    return always(settings.plan, router=context.default)


KIND = PolicyKind(settings=FixedSettings, build=_build)
