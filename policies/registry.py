"""Policy kinds by name: from a specification (JSON/YAML data) to a policy.

A policy of one's own is a file with a `PolicyKind` and a line here, or no line at all from another
distribution: see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policies.base import ModelFacts, Policy, members_of
from policies.building import BuildContext, PolicyKind
from policies.errors import PolicyError
from policies.plugins import Plugins, read_spec

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
    },
)


def build_policy(
    spec: Mapping[str, Any], *, folder: Path, models: Mapping[str, ModelFacts]
) -> Policy:
    """Build the policy that `spec` describes, by itself: see `build_in`."""
    return build_in(spec, BuildContext(folder=folder, models=models, build=build_in))


def build_in(spec: Mapping[str, Any], context: BuildContext) -> Policy:
    """Build the policy that `spec` describes: its `kind` and that kind's own keys.

    Raises `PolicyError` for an unknown kind or key, or a policy that names a model the pool lacks.
    """
    kind, settings = read_spec(KINDS, spec)
    policy = kind.build(settings, context)
    for member in members_of(policy):
        if member not in context.models:
            raise PolicyError(
                f"the policy names the model {member!r}, which the pool lacks; "
                f"it has {', '.join(sorted(context.models))}"
            )
    return policy
