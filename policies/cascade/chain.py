"""A learned cascade: its scorer, its stages and its frontier, in one file.

The file is a NumPy archive (.npz) of plain arrays with one JSON text among them; nothing in it
can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from policies.cascade.frontier import CascadePoint
from policies.cascade.scorer import ScorerWeights, restore_weights
from policies.errors import PolicyError
from policies.files import replacing
from policies.plan import Answer, Plan, from_json, to_json

ROUTED = "routed"
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class LearnedCascade:
    """What `shoal train cascade` writes.

    `plans` are the stages by name. The stage `ROUTED`, where a chain has it, is for each query the
    one of `routed` with the highest prior. Of a fusion in `top`, only so many members run: those
    with the highest prior as stages of their own; `prior_power` sharpens the priors where they
    become a fusion's weights. `frontier` is ascending in cost (mean US dollars per query); `chosen`
    is the index of the point that the training budget picked.
    """

    plans: Mapping[str, Plan]
    routed: tuple[str, ...]
    frontier: tuple[CascadePoint, ...]
    chosen: int
    weights: ScorerWeights
    top: Mapping[str, int] = field(default_factory=dict)
    prior_power: float = 1.0

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
        meta = {
            "format": _FORMAT,
            "plans": {name: to_json(plan) for name, plan in self.plans.items()},
            "routed": self.routed,
            "frontier": [asdict(point) for point in self.frontier],
            "chosen": self.chosen,
            "scorer": self.weights.settings(),
            "top": dict(self.top),
            "prior_power": self.prior_power,
        }
        with replacing(file) as fresh, fresh.open("wb") as stream:
            arrays: dict[str, Any] = {"meta": np.array(json.dumps(meta)), **self.weights.arrays()}
            np.savez_compressed(stream, **arrays)


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
    """Read what `LearnedCascade.save` wrote. Raises `PolicyError` that names the file."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta: dict[str, Any] = json.loads(str(arrays.pop("meta")))
        if meta.get("format") != _FORMAT:
            raise PolicyError(
                f"format {meta.get('format')!r} is not {_FORMAT}; learn it anew with "
                "`shoal train cascade`"
            )
        points = tuple(
            CascadePoint(
                stages=tuple(point["stages"]),
                thresholds=tuple(point["thresholds"]),
                gates=tuple(point["gates"]),
                accuracy=float(point["accuracy"]),
                cost=float(point["cost"]),
            )
            for point in meta["frontier"]
        )
        return LearnedCascade(
            plans={name: from_json(plan) for name, plan in meta["plans"].items()},
            routed=tuple(meta["routed"]),
            frontier=points,
            chosen=int(meta["chosen"]),
            weights=restore_weights(meta["scorer"], arrays),
            top={name: int(size) for name, size in meta["top"].items()},
            prior_power=float(meta["prior_power"]),
        )
    except FileNotFoundError:
        raise PolicyError(f"there is no cascade file at {file}") from None
    except (EOFError, OSError, BadZipFile, KeyError, TypeError, ValueError) as error:
        raise PolicyError(f"{file} is not a cascade file: {error}") from None
