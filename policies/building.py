"""What a policy is built from, and what it brings along for the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from policies.base import ModelFacts, Policy
from policies.budget.controller import Controller
from policies.cascade.base import Scorer
from policies.errors import PolicyError


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
