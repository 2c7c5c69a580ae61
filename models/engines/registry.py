"""Engine kinds by name. Each is imported only when a pool uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from models.engines.base import Engine
from models.errors import PoolError
from models.pool import EngineSpec, Model

Factory = Callable[[EngineSpec, Sequence[Model]], Engine]

# kind -> module that defines create(spec, models) -> Engine
_MODULES: dict[str, str] = {
    "stacked": "models.engines.stacked",
    "fake": "models.engines.fake",
}


def create_engine(spec: EngineSpec, models: Sequence[Model]) -> Engine:
    """Make (not start) the engine that `spec` describes for `models`.

    Raises `PoolError` for an unknown kind, or options that the kind does not know.
    """
    if spec.kind not in _MODULES:
        raise PoolError(
            f"engines.{spec.name}.kind: {spec.kind!r} is unknown; "
            f"allowed are {', '.join(sorted(_MODULES))}"
        )
    factory: Factory = import_module(_MODULES[spec.kind]).create
    return factory(spec, models)
