"""Scorers of a pool file, from their specifications (JSON/YAML data)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from policies.cascade.base import Scorer
from policies.cascade.transformer import build_transformer
from policies.errors import PolicyError


def build_scorer(spec: Mapping[str, Any], *, folder: Path) -> Scorer:
    """Build the scorer that `spec` describes: its `kind` and that kind's own keys.

    `folder` is where relative paths start. Raises `PolicyError` for an unknown kind, key or value.
    """
    kind = spec.get("kind")
    if kind not in _BUILDERS:
        raise PolicyError(f"kind: {kind!r} is unknown; allowed are {', '.join(sorted(_BUILDERS))}")
    return _BUILDERS[kind]({key: value for key, value in spec.items() if key != "kind"}, folder)


_BUILDERS: dict[str, Callable[[Mapping[str, Any], Path], Scorer]] = {
    "transformer": build_transformer,
}
