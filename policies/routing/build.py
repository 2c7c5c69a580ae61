"""From a policy's specification to a policy over a trained router."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policies.base import ModelFacts
from policies.errors import PolicyError
from policies.plan import from_json
from policies.routing.choice import Trade
from policies.routing.clusters import Clusters
from policies.routing.file import load_router
from policies.routing.learned import Learned

REQUIRED = ("path",)
OPTIONAL = ("members", "fallback", "answer_value_usd")


def build_routed(
    kind: type[Learned], body: Mapping[str, Any], folder: Path, models: Mapping[str, ModelFacts]
) -> Learned:
    """Build `Learned` or `Clusters`: `path` of the router file, relative to `folder`.

    `members` limits the choice, `fallback` is the plan for unfamiliar queries, `answer_value_usd`
    what a right answer is worth. Raises `PolicyError` that names the key.
    """
    names = body.get("members")
    if names is not None and not (
        isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)
    ):
        raise PolicyError(f"members: {names!r} is not a list of models' names")
    value = body.get("answer_value_usd")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise PolicyError(f"answer_value_usd: {value!r} is not a number")
    return kind(
        load_router(folder / str(body["path"])),
        models=models,
        trade=Trade(answer_value_usd=value, members=None if names is None else tuple(names)),
        fallback=from_json(body["fallback"]) if "fallback" in body else None,
    )


__all__ = ["OPTIONAL", "REQUIRED", "Clusters", "Learned", "build_routed"]
