"""`/v1/models`: the names that `model` takes."""

from __future__ import annotations

from typing import Any

from policies.base import members_of
from router.catalog.catalog import Catalog


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
    entry["shoal"] = {
        "kind": "encoder" if catalog.members.encodes(name) else "model",
        "engine": model.spec.engine,
        "parameters": facts.parameters,
        "context_tokens": model.card.context_tokens if model.card else None,
        "domains": list(facts.domains),
        "description": model.spec.description,
        "usd_per_million_input_tokens": model.spec.usd_per_million_input_tokens,
        "usd_per_million_output_tokens": model.spec.usd_per_million_output_tokens,
    }
    return entry
