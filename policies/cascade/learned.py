"""A learned cascade: its scorer, its stages and its frontier, in one file (an artifact)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from policies.cascade.scorer import ScorerWeights, restore_weights
from policies.errors import PolicyError
from policies.files import Artifact, read_artifact, write_artifact
from policies.plan import Answer, Plan, from_json, to_json

ROUTED: Final = "routed"

_KIND: Final = "cascade"
_SCHEMA: Final = 3


@dataclass(frozen=True, kw_only=True)
class CascadePoint:
    """One choice on the frontier: a chain, its thresholds and gates, and what they gave.

    `thresholds` and `gates` have one entry per stage but the last, each in [0, 1]; a gate of 0
    never skips. `cost` is the mean per query in the table's unit.
    """

    stages: tuple[str, ...]
    thresholds: tuple[float, ...]
    gates: tuple[float, ...]
    accuracy: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class LearnedCascade:
    """What `shoal train cascade` writes.

    `plans` are the stages by name. The stage `ROUTED`, where a chain has it, is for each query the
    one of `routed` with the highest prior. Of a fusion in `top`, only so many members run: those
    with the highest prior as stages of their own; `prior_power` sharpens the priors where they
    become a fusion's weights. `frontier` is ascending in cost (mean US dollars per query); `chosen`
    is the index of the point that the training budget picked. `data_sha256` is the hash of the
    outcomes that it was learned from.
    """

    plans: Mapping[str, Plan]
    routed: tuple[str, ...]
    frontier: tuple[CascadePoint, ...]
    chosen: int
    weights: ScorerWeights
    top: Mapping[str, int] = field(default_factory=dict)
    prior_power: float = 1.0
    data_sha256: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.chosen < len(self.frontier):
            raise PolicyError(
                f"cascade: chosen is {self.chosen}, allowed are 0 to {len(self.frontier) - 1}"
            )
        for name in {ROUTED, *self.routed, *(n for p in self.frontier for n in p.stages)}:
            if name != ROUTED and name not in self.plans:
                raise PolicyError(f"cascade: the stage {name!r} has no plan")
            if name != ROUTED and name not in self.weights.stages:
                raise PolicyError(f"cascade: the scorer does not know the stage {name!r}")
        check_top(self.plans, self.top)

    def save(self, file: Path) -> None:
        """Write to `file` atomically."""
        point = self.frontier[self.chosen]
        artifact = Artifact(
            data_sha256=self.data_sha256,
            metrics={"accuracy": point.accuracy, "usd_per_query": point.cost},
            settings={
                "plans": {name: to_json(plan) for name, plan in self.plans.items()},
                "routed": self.routed,
                "frontier": [asdict(point) for point in self.frontier],
                "chosen": self.chosen,
                "scorer": self.weights.settings(),
                "top": dict(self.top),
                "prior_power": self.prior_power,
            },
            arrays=self.weights.arrays(),
        )
        write_artifact(file, artifact, kind=_KIND, schema=_SCHEMA)


def within_budget(frontier: Sequence[CascadePoint], budget: float) -> CascadePoint:
    """Return the most accurate point whose mean cost is at most `budget`, the cheaper on a tie.

    Raises `PolicyError` that names the cheapest cost when nothing is affordable.
    """
    affordable = [point for point in frontier if point.cost <= budget * (1 + 1e-12)]
    if not affordable:
        cheapest = min(point.cost for point in frontier)
        raise PolicyError(
            f"budget: {budget:g} USD per query is below the cheapest chain's cost, {cheapest:g}"
        )
    return max(affordable, key=lambda point: (point.accuracy, -point.cost))


def check_top(plans: Mapping[str, Plan], top: Mapping[str, int]) -> None:
    """Raise `PolicyError` unless every stage in `top` is a fusion of at least so many members."""
    for name, size in top.items():
        plan = plans.get(name)
        if not isinstance(plan, Answer) or plan.weights is not None:
            raise PolicyError(f"cascade: the stage {name!r} in top is no fusion without weights")
        if not 2 <= size <= len(plan.members):
            raise PolicyError(
                f"cascade: top of the stage {name!r} is {size}, allowed are 2 to "
                f"{len(plan.members)}"
            )


def load_cascade(file: Path) -> LearnedCascade:
    """Read what `LearnedCascade.save` wrote. Raises `ArtifactError` that names the file."""
    return read_artifact(file, _restored, kind=_KIND, schema=_SCHEMA)


def _restored(artifact: Artifact) -> LearnedCascade:
    stored: Mapping[str, Any] = artifact.settings
    return LearnedCascade(
        plans={name: from_json(plan) for name, plan in stored["plans"].items()},
        routed=tuple(stored["routed"]),
        frontier=TypeAdapter(tuple[CascadePoint, ...]).validate_python(stored["frontier"]),
        chosen=int(stored["chosen"]),
        weights=restore_weights(stored["scorer"], artifact.arrays),
        top={name: int(size) for name, size in stored["top"].items()},
        prior_power=float(stored["prior_power"]),
        data_sha256=artifact.data_sha256,
    )
