"""Scorers of a pool file by kind: ours, and those of the entry point group `shoal.scorers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from policies.cascade.base import Scorer
from policies.plugins import Plugins, read_spec
from policies.validation import Settings

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class ScorerKind(Generic[S]):
    """What `kind: NAME` of a scorer stands for: the keys beside it, and what they build.

    `build` takes the folder where relative paths start, and raises `PolicyError`.
    """

    settings: type[S]
    build: Callable[[S, Path], Scorer]


KINDS: Plugins[ScorerKind[Any]] = Plugins(
    "shoal.scorers", ScorerKind, {"transformer": "policies.cascade.transformer:KIND"}
)


def build_scorer(spec: Mapping[str, Any], *, folder: Path) -> Scorer:
    """Build the scorer that `spec` describes: its `kind` and that kind's own keys.

    `folder` is where relative paths start. Raises `PolicyError` for an unknown kind, key or value.
    """
    kind, settings = read_spec(KINDS, spec)
    return kind.build(settings, folder)
