"""Engine kinds by name. Each is imported only when a pool uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from models.engines.traits import EngineTraits
from models.errors import PoolError

if TYPE_CHECKING:
    from models.engines.base import Engine
    from models.spec import EngineSpec, Model

    Factory: TypeAlias = Callable[[EngineSpec, Sequence[Model]], Engine]
    Inspection: TypeAlias = Callable[[EngineSpec, Sequence[Model]], EngineTraits]

# kind -> module that defines create(spec, models) -> Engine
_MODULES: dict[str, str] = {
    "stacked": "models.engines.stacked",
    "fake": "models.engines.fake",
    "remote": "models.engines.remote.engine",
    "vllm": "models.engines.vllm.engine",
}

# kind -> module that defines inspect(spec, models) -> EngineTraits and imports no tensor library.
_INSPECTED: dict[str, str] = {
    "remote": "models.engines.remote.options",
    "vllm": "models.engines.vllm.options",
}


def create_engine(spec: EngineSpec, models: Sequence[Model]) -> Engine:
    """Make (not start) the engine that `spec` describes for `models`.

    Raises `PoolError` for an unknown kind, or options that the kind does not know.
    """
    _check_kind(spec)
    factory: Factory = import_module(_MODULES[spec.kind]).create
    return factory(spec, models)


def engine_traits(spec: EngineSpec, models: Sequence[Model]) -> EngineTraits:
    """Return what is known of the engine that `spec` describes, before it is made.

    Raises `PoolError` for what can be told to be wrong already.
    """
    _check_kind(spec)
    if spec.kind != "remote":
        for model in models:
            if model.spec.remote is not None:
                raise PoolError(
                    f"models.{model.name}.remote: the engine {spec.name!r} is of kind "
                    f"{spec.kind!r}; only an engine of kind 'remote' runs remote models"
                )
    if spec.kind not in _INSPECTED:
        return EngineTraits()
    inspect: Inspection = import_module(_INSPECTED[spec.kind]).inspect
    return inspect(spec, models)


def _check_kind(spec: EngineSpec) -> None:
    if spec.kind not in _MODULES:
        raise PoolError(
            f"engines.{spec.name}.kind: {spec.kind!r} is unknown; "
            f"allowed are {', '.join(sorted(_MODULES))}"
        )
