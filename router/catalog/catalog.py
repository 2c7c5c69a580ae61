"""Everything that clients can ask one pool for, by the names that they use: see `/v1/models`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from models.pool import Pool
from policies.base import Policy, members_of
from policies.carbon.economics import EconomicsSettings
from policies.carbon.settings import CarbonSettings
from policies.plan import Answer
from router.catalog.members import Members, Prices
from router.catalog.policies import DEFAULT_POLICY, Policies

_POLICY_PREFIX = "policy/"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a served name stands for; `policy_name` is None where the client named a model."""

    policy: Policy
    policy_name: str | None


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """A pool's members, prices and policies, and what each served name stands for.

    `targets` has the default policy first. `fingerprint` changes with what answers, `created_s` is
    the Unix time at which the pool was loaded.
    """

    pool: Pool
    members: Members
    prices: Prices
    policies: Policies
    targets: Mapping[str, Target]
    fingerprint: str
    created_s: int = field(default_factory=lambda: int(time.time()))


def load_catalog(
    pool: Pool,
    *,
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    carbon: CarbonSettings | None = None,
    economics: EconomicsSettings | None = None,
    beside: Catalog | None = None,
) -> Catalog:
    """Check `pool` and the `policies` added to its own; `carbon` prices energy and carbon, and
    `economics` money where it follows from the hardware.

    The catalog `beside` which this one is shares the grid, and if its models are the same what it
    knows of them: tokenizers, prices, and how long answers took.

    Raises `PoolError` (also for a plan that no engine can run) and `PolicyError`.
    """
    same = beside is not None and beside.pool.models == pool.models
    if beside is not None and same:
        members, prices = beside.members, beside.prices
    else:
        grid = beside.prices.grid if beside is not None else None
        members, prices = (
            Members(pool),
            Prices(pool, carbon or CarbonSettings(), economics, grid=grid),
        )
    specs = {**pool.policies, **(policies or {})}
    built = Policies(pool, specs=specs, members=members, models=prices.facts)
    if beside is not None and same:
        built.limiter = beside.policies.limiter
    named = {name: Target(policy=policy, policy_name=name) for name, policy in built.items()}
    return Catalog(
        pool=pool,
        members=members,
        prices=prices,
        policies=built,
        targets={
            DEFAULT_POLICY: named[DEFAULT_POLICY],
            **{_POLICY_PREFIX + name: target for name, target in named.items()},
            **{
                model.name: Target(
                    policy=built.fixed(Answer(members=(model.name,))), policy_name=None
                )
                for model in pool.models
            },
        },
        fingerprint=_fingerprint(pool),
    )


def _fingerprint(pool: Pool) -> str:
    seen = [
        version("shoal"),
        [
            (
                m.spec.model_dump(mode="json"),
                m.card.prompt_sha256 if m.card else None,
                *([m.adapter.sha256] if m.adapter else ()),
            )
            for m in pool.models
        ],
    ]
    return "fp_" + hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:10]


def list_models(catalog: Catalog) -> dict[str, Any]:
    """Return the list of everything that can be asked for."""
    return {"object": "list", "data": [describe_model(catalog, name) for name in catalog.targets]}


def describe_model(catalog: Catalog, name: str) -> dict[str, Any]:
    """Return one entry; a model's `shoal` object holds its facts, a policy's its members."""
    entry: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": catalog.created_s,
        "owned_by": catalog.pool.name,
    }
    if name not in catalog.prices.facts:
        members = members_of(catalog.targets[name].policy)
        entry["shoal"] = {"kind": "policy", "members": list(members)}
        return entry
    model, facts = catalog.pool.model(name), catalog.prices.facts[name]
    if model.spec.base is not None:
        entry["parent"] = model.spec.base
    context_tokens = catalog.members.context_tokens(Answer(members=(name,)))
    entry["max_model_len"] = context_tokens  # vLLM's name for it
    entry["shoal"] = {
        "kind": "encoder" if catalog.members.encodes(name) else "model",
        "engine": model.spec.engine,
        "parameters": facts.parameters,
        "context_tokens": context_tokens,
        "domains": list(facts.domains),
        "description": model.spec.description,
        "usd_per_million_input_tokens": model.spec.usd_per_million_input_tokens,
        "usd_per_million_output_tokens": model.spec.usd_per_million_output_tokens,
    }
    return entry
