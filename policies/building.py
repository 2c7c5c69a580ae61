"""How policies are built: from settings of their own, each in a context that all share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from policies.base import ModelFacts, Policy
from policies.budget.controller import Controller
from policies.cascade.base import Scorer
from policies.errors import PolicyError
from policies.validation import Settings

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class PolicyKind(Generic[S]):
    """What `kind: NAME` in a pool file stands for: the keys beside it, and what they build.

    Defined beside the policy and named in `policies.registry`, or by another distribution in the
    entry point group `shoal.policies`. `build` raises `PolicyError` for settings that do not go
    with each other or with the pool.
    """

    settings: type[S]
    build: Callable[[S, BuildContext], Policy]


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Where a policy comes to be.

    `folder` is where relative paths start; `models` are the pool's by name, live where rates follow
    the grid; `default` is the pool's default policy (None while it is built itself), whose
    predictions fill in weights that plans leave open. `build` builds any policy. A policy leaves
    here what it brings along: `scorers` that plans may name, and the `controllers` that hold its
    targets. The scorers in `reserved` are the pool's own.
    """

    folder: Path
    models: Mapping[str, ModelFacts]
    build: Callable[[Mapping[str, Any], BuildContext], Policy]
    default: Policy | None = None
    scorers: dict[str, Scorer] = field(default_factory=dict)
    controllers: list[Controller] = field(default_factory=list)
    reserved: frozenset[str] = frozenset()

    def nested(self, spec: Mapping[str, Any]) -> Policy:
        """Return the policy that `spec` describes, to be wrapped; its targets hold for nobody."""
        return self.build(spec, replace(self, controllers=[]))

    def bring_scorer(self, name: str, scorer: Scorer) -> None:
        """Let plans name `scorer`; raises `PolicyError` where the pool has one of that name."""
        if name in self.reserved:
            raise PolicyError(f"scorer {name!r}: the pool has a scorer of that name already")
        self.scorers[name] = scorer
