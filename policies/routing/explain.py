"""Explanations, computed only when asked: the request path stays fast."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from policies.base import Decision, Policy, Query


@runtime_checkable
class ExplainsDecisions(Protocol):
    """A policy that can say more about a decision than `decide` does."""

    def explain(self, query: Query) -> Decision:
        """Return what `decide` returns, with `details` filled in."""
        ...


def explain_decision(policy: Policy, query: Query) -> Decision:
    """Return the decision with details, where the policy has any to give."""
    return policy.explain(query) if isinstance(policy, ExplainsDecisions) else policy.decide(query)
