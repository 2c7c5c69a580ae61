"""A pool's own laws: constants fitted to its measurements, in `laws.npz` beside the pool file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from policies.errors import LawError
from policies.files import Artifact, read_artifact, write_artifact
from policies.laws.downscaling import MixtureLaw, PostPruningLaw
from policies.laws.scaling import EnsembleLaw

LAWS_FILE: Final = "laws.npz"

_KIND: Final = "laws"
_SCHEMA: Final = 1


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


_KINDS: dict[str, type[Any]] = {
    "ensemble_error": EnsembleLaw,
    "ensemble_loss": EnsembleLaw,
    "mixture_general": MixtureLaw,
    "mixture_domain": MixtureLaw,
    "post_pruning": PostPruningLaw,
}


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
    laws = dict(artifact.settings)
    origin = laws.pop("origin", None)
    if not isinstance(origin, str):
        raise LawError(f"origin: {origin!r} does not say where the constants come from")
    for name, constants in laws.items():
        if name not in _KINDS:
            raise LawError(f"the key {name!r} is unknown; allowed are origin, {', '.join(_KINDS)}")
        laws[name] = _law(name, _KINDS[name], constants)
    rmse = {name: float(value) for name, value in artifact.metrics.get("rmse", {}).items()}
    return PoolLaws(origin=origin, data_sha256=artifact.data_sha256, rmse=rmse, **laws)


def _law(name: str, kind: type[Any], constants: object) -> Any:  # noqa: ANN401 - any law
    allowed = [one.name for one in fields(kind)]
    if not isinstance(constants, dict) or set(constants) != set(allowed):
        raise LawError(f"{name}: exactly the keys {', '.join(allowed)} are needed")
    for key, value in constants.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LawError(f"{name}.{key}: {value!r} is not a number")
    return kind(**{key: float(value) for key, value in constants.items()})
