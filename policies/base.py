"""The contract of everything that decides: a `Policy` maps a `Query` to a `Decision`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from policies.footprint import NO_LIMITS, Footprint, Limits, Rates
from policies.plan import Plan, members


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a policy may know about a model of the pool.

    A `remote` model runs on somebody else's machine; its `parameters` are what the pool file
    states, or None. `domains` are the pool file's tags.
    """

    name: str
    rates: Rates
    parameters: int | None = None
    domains: tuple[str, ...] = ()
    remote: bool = False


@dataclass(frozen=True, kw_only=True)
class Query:
    """What a policy may look at.

    `text` is the last user message (what embeddings and n-grams see), `earlier` are the newest of
    the user's messages before it, in their order; `prompt_tokens` is the length of the whole
    templated conversation; `max_tokens` the most the answer may take. `user`, `session` and
    `key_id` identify who asks, where known. `limits` are this request's own ceilings on cost and
    its floor on quality, which a `Budgeted` policy obeys. With `explain`, a policy that can say
    more about its decision does, in `Decision.details`; it decides the same.
    """

    text: str
    earlier: tuple[str, ...] = ()
    prompt_tokens: int = 0
    max_tokens: int = 0
    user: str | None = None
    session: str | None = None
    key_id: str | None = None
    limits: Limits = NO_LIMITS
    explain: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A plan and why it was chosen.

    `scores` holds the predicted quality in [0, 1] of each member the policy considered (empty
    where it predicts none); `reason` is one sentence for a person; `details` is JSON data for
    explanations (nearest cluster, strongest n-grams, propensities ...). `limited` says that the
    plan was chosen with the query's limits in mind, `familiar` whether the query is like those that
    the policy learned from (None: it did not learn, or cannot tell).
    """

    plan: Plan
    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    limited: bool = False
    familiar: bool | None = None


class Policy(ABC):
    """Chooses a plan for each query; fast, thread-safe and free of I/O.

    This is all that a server asks of a policy, so all that one needs to have.
    """

    @abstractmethod
    def decide(self, query: Query) -> Decision:
        """Return the plan for `query`; never raises on any text."""

    @abstractmethod
    def plans(self) -> Iterable[Plan]:
        """Return every plan that `decide` may return, for a pool to check when it loads.

        Where these are parts of one fusion or cascade, the whole of it stands for them all, its
        weights left open. A single member of the pool can always answer alone.
        """

    def settle(self, query: Query, decision: Decision, cost: Footprint) -> None:  # noqa: B027
        """Learn what a query that was decided here has cost; most policies have no use for it.

        Called once for each decision; with `Footprint()` where nothing ran for it.
        """

    def predict(self, query: Query) -> Mapping[str, float]:
        """Return the scores that `decide` would predict, for who wants these alone."""
        decision = self.decide(query)
        self.settle(query, decision, Footprint())
        return decision.scores


def members_of(policy: Policy) -> tuple[str, ...]:
    """Return every model that the plans of `policy` name."""
    return tuple(dict.fromkeys(name for plan in policy.plans() for name in members(plan)))
