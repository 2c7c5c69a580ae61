"""The contract of everything that decides: a `Policy` maps a `Query` to a `Decision`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from policies.footprint import Rates
from policies.limits import NO_LIMITS, Limits
from policies.plan import Plan


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

    `text` is the last user message (what embeddings and n-grams see); `prompt_tokens` is the
    length of the whole templated conversation; `max_tokens` the most the answer may take.
    `user`, `session` and `key_id` identify who asks, where known. `limits` are this request's own
    ceilings on cost and its floor on quality, which a `Budgeted` policy obeys.
    """

    text: str
    prompt_tokens: int = 0
    max_tokens: int = 0
    user: str | None = None
    session: str | None = None
    key_id: str | None = None
    limits: Limits = NO_LIMITS


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A plan and why it was chosen.

    `scores` holds the predicted quality in [0, 1] of each member the policy considered (empty
    where it predicts none); `reason` is one sentence for a person; `details` is JSON data for
    explanations (nearest cluster, strongest n-grams, propensities ...).
    """

    plan: Plan
    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Policy(Protocol):
    """Chooses a plan for each query. Must be fast, thread-safe and free of I/O in `decide`."""

    def decide(self, query: Query) -> Decision:
        """Return the plan for `query`; never raises on any text."""
        ...

    def members(self) -> tuple[str, ...]:
        """Return every model this policy may name, so that a pool can refuse it at load."""
        ...
