"""A policy that always chooses the same plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.base import Decision, Policy, Query
from policies.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Fixed(Policy):
    """Always `plan`: a single model, a fixed fusion, or a fixed cascade."""

    plan: Plan

    def decide(self, query: Query) -> Decision:  # noqa: ARG002 - the contract's signature
        """Return `plan`, whatever the query."""
        return Decision(plan=self.plan, reason="fixed plan")

    def plans(self) -> Iterable[Plan]:
        """Return `plan`."""
        return (self.plan,)
