"""A policy that always chooses the same plan."""

from __future__ import annotations

from dataclasses import dataclass

from policies.base import Decision, Query
from policies.plan import Plan, members


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Always `plan`: a single model, a fixed fusion, or a fixed cascade."""

    plan: Plan

    def decide(self, query: Query) -> Decision:  # noqa: ARG002 - the contract's signature
        """Return `plan`, whatever the query."""
        return Decision(plan=self.plan, reason="fixed plan")

    def members(self) -> tuple[str, ...]:
        """Return the members of `plan`."""
        return members(self.plan)
