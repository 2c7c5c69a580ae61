"""A pool's own laws: constants fitted to its measurements, in `laws.npz` beside the pool file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError, with_config

from policies.errors import LawError
from policies.files import Artifact, read_artifact, write_artifact
from policies.kinds import first_problem
from policies.laws.downscaling import MixtureLaw, PostPruningLaw
from policies.laws.scaling import EnsembleLaw

LAWS_FILE: Final = "laws.npz"

_KIND: Final = "laws"
_SCHEMA: Final = 1


@with_config(extra="forbid", strict=True)
@dataclass(frozen=True, kw_only=True)
class PoolLaws:
    """Laws fitted to one pool; None where nobody measured. `origin` says on what and when.

    `data_sha256` is the hash of the measurements that they were fitted to, and `rmse` how far each
    law, by its name here, is from them in the mean (root of the squares); empty where unknown.

    `ensemble_error` is the ensemble law of the share of wrong answers, which the budget controller
    uses; `ensemble_loss` that of the loss in nats per token. `mixture_general` is the D-CPT law of
    the general loss, `mixture_domain` that of the domains' own.
    """

    origin: str
    ensemble_error: EnsembleLaw | None = None
    ensemble_loss: EnsembleLaw | None = None
    mixture_general: MixtureLaw | None = None
    mixture_domain: MixtureLaw | None = None
    post_pruning: PostPruningLaw | None = None
    data_sha256: str = ""
    rmse: Mapping[str, float] = field(default_factory=dict)


def write_laws(file: Path, laws: PoolLaws) -> None:
    """Write `laws` to `file` atomically, leaving out what is None."""
    fitted = {name: value for name, value in asdict(laws).items() if value is not None}
    artifact = Artifact(
        data_sha256=fitted.pop("data_sha256"),
        metrics={"rmse": fitted.pop("rmse")},
        settings=fitted,
    )
    write_artifact(file, artifact, kind=_KIND, schema=_SCHEMA)


def read_laws(file: Path) -> PoolLaws:
    """Read `file`; `ArtifactError` names the file, the key and what is allowed."""
    return read_artifact(file, _restored, kind=_KIND, schema=_SCHEMA)


def _restored(artifact: Artifact) -> PoolLaws:
    rmse = {name: float(value) for name, value in artifact.metrics.get("rmse", {}).items()}
    told = {**artifact.settings, "data_sha256": artifact.data_sha256, "rmse": rmse}
    try:
        return TypeAdapter(PoolLaws).validate_json(json.dumps(told))
    except ValidationError as error:
        allowed = [each.name for each in fields(PoolLaws)]
        raise LawError(first_problem(error, where="laws", keys=allowed)) from None
