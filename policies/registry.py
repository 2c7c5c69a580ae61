"""Policies by kind: from a specification (JSON/YAML data) to a policy, in a context that all share.

A policy of one's own is a file with a `PolicyKind` and a line in `KINDS`, or no line at all from
another distribution: see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from policies.base import ModelFacts, Policy, members_of
from policies.budget.controller import Controller
from policies.cascade.base import Scorer
from policies.errors import PolicyError
from policies.kinds import Plugins, Settings, read_spec

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class PolicyKind(Generic[S]):
    """What `kind: NAME` in a pool file stands for: the keys beside it, and what they build.

    Defined beside the policy and named in `KINDS`, or by another distribution in the entry point
    group `shoal.policies`. `build` raises `PolicyError` for settings that do not go
    with each other or with the pool.
    """

    settings: type[S]
    build: Callable[[S, BuildContext], Policy]


KINDS: Plugins[PolicyKind[Any]] = Plugins(
    "shoal.policies",
    PolicyKind,
    {
        "budgeted": "policies.budgeted:KIND",
        "clusters": "policies.routing.policy:CLUSTERS",
        "fixed": "policies.fixed:KIND",
        "frugal": "policies.frugal:KIND",
        "fused": "policies.fused:KIND",
        "learned": "policies.routing.policy:LEARNED",
        "probing": "policies.routing.probing:KIND",
        "speculative": "policies.speculative:KIND",
    },
)


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Where a policy comes to be.

    `folder` is where relative paths start; `models` are the pool's by name, live where rates follow
    the grid; `default` is the pool's default policy (None while it is built itself), whose
    predictions fill in weights that plans leave open. A policy leaves here what it brings along:
    `scorers` that plans may name, and the `controllers` that hold its targets. The scorers in
    `reserved` are the pool's own.
    """

    folder: Path
    models: Mapping[str, ModelFacts]
    default: Policy | None = None
    scorers: dict[str, Scorer] = field(default_factory=dict)
    controllers: list[Controller] = field(default_factory=list)
    reserved: frozenset[str] = frozenset()

    def build(self, spec: Mapping[str, Any]) -> Policy:
        """Return the policy that `spec` describes: its `kind` and that kind's own keys.

        Raises `PolicyError` for an unknown kind or key, or a policy that names a model the pool
        lacks.
        """
        kind, settings = read_spec(KINDS, spec)
        policy: Policy = kind.build(settings, self)
        for member in members_of(policy):
            if member not in self.models:
                raise PolicyError(
                    f"the policy names the model {member!r}, which the pool lacks; "
                    f"it has {', '.join(sorted(self.models))}"
                )
        return policy

    def nested(self, spec: Mapping[str, Any]) -> Policy:
        """Return the policy that `spec` describes, to be wrapped; its targets hold for nobody."""
        return replace(self, controllers=[]).build(spec)

    def bring_scorer(self, name: str, scorer: Scorer) -> None:
        """Let plans name `scorer`; raises `PolicyError` where the pool has one of that name."""
        if name in self.reserved:
            raise PolicyError(f"scorer {name!r}: the pool has a scorer of that name already")
        self.scorers[name] = scorer


def build_policy(
    spec: Mapping[str, Any], *, folder: Path, models: Mapping[str, ModelFacts]
) -> Policy:
    """Return the policy that `spec` describes, by itself: see `BuildContext.build`."""
    return BuildContext(folder=folder, models=models).build(spec)
