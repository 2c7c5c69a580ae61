"""A pool's own laws: constants fitted to its measurements, in `laws.json` beside the pool file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from policies.errors import LawError
from policies.files import write_atomic
from policies.laws.ensemble import EnsembleLaw
from policies.laws.mixture import MixtureLaw
from policies.laws.pruning import PostPruningLaw
from policies.laws.scaling import Chinchilla


@dataclass(frozen=True, kw_only=True)
class PoolLaws:
    """Laws fitted to one pool; None where nobody measured. `origin` says on what and when.

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
    scaling: Chinchilla | None = None


_KINDS: dict[str, type[Any]] = {
    "ensemble_error": EnsembleLaw,
    "ensemble_loss": EnsembleLaw,
    "mixture_general": MixtureLaw,
    "mixture_domain": MixtureLaw,
    "post_pruning": PostPruningLaw,
    "scaling": Chinchilla,
}


def read_laws(file: Path) -> PoolLaws:
    """Read `file`; `LawError` names the file, the key and what is allowed."""
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise LawError(f"there is no laws file at {file}") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise LawError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("origin"), str):
        raise LawError(f"{file}: origin: say in a string where the constants come from")
    laws: dict[str, Any] = {"origin": data.pop("origin")}
    for name, constants in data.items():
        if name not in _KINDS:
            raise LawError(
                f"{file}: the key {name!r} is unknown; allowed are origin, {', '.join(_KINDS)}"
            )
        laws[name] = _read_law(f"{file}: {name}", _KINDS[name], constants)
    return PoolLaws(**laws)


def write_laws(file: Path, laws: PoolLaws) -> None:
    """Write `laws` to `file` atomically, leaving out what is None."""
    data = {name: value for name, value in asdict(laws).items() if value is not None}
    write_atomic(file, json.dumps(data, indent=2) + "\n")


def _read_law(where: str, kind: type[Any], constants: object) -> Any:  # noqa: ANN401 - any law
    allowed = [field.name for field in fields(kind)]
    if not isinstance(constants, dict) or set(constants) != set(allowed):
        raise LawError(f"{where}: exactly the keys {', '.join(allowed)} are needed")
    for key, value in constants.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LawError(f"{where}.{key}: {value!r} is not a number")
    return kind(**{key: float(value) for key, value in constants.items()})
