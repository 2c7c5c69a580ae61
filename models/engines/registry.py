"""Engine kinds by name: Shoal's own, and those of the entry point group `shoal.engines`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from models.engines.base import Engine
from models.engines.kind import EngineKind, EngineTraits, Format
from models.engines.supervisor import SupervisedEngine
from models.errors import PoolError
from models.spec import EngineSpec, Model
from policies.kinds import PluginError, Plugins, explain

KINDS: Plugins[EngineKind[Any]] = Plugins(
    "shoal.engines",
    EngineKind,
    {
        "encoder": "models.engines.encoder:KIND",
        "fake": "models.engines.fake:KIND",
        "llamacpp": "models.engines.llamacpp:KIND",
        "remote": "models.engines.remote.engine:KIND",
        "stacked": "models.engines.stacked:KIND",
        "vllm": "models.engines.vllm:KIND",
    },
)


def engine_traits(spec: EngineSpec, models: Sequence[Model]) -> EngineTraits:
    """Return what is known of the engine that `spec` describes, before it is made.

    Raises `PoolError` for an unknown kind, for options that the kind does not know, and for what
    else can be told to be wrong already.
    """
    kind, options = _read(spec, models)
    return kind.inspect(spec, options, models)


def create_engine(spec: EngineSpec, models: Sequence[Model]) -> Engine:
    """Make (not start) the engine that `spec` describes for `models`.

    Raises `PoolError` as `engine_traits` does, and where something is missing on this machine.
    """
    kind, options = _read(spec, models)
    needs = kind.inspect(spec, options, models).needs
    if needs is not None:
        raise PoolError(f"engines.{spec.name}: {needs}")
    return kind.create(spec, options, models)


def supervised_engine(spec: EngineSpec, models: Sequence[Model]) -> SupervisedEngine:
    """Make (not start) the engine, as one that is started again whenever it has failed."""
    return SupervisedEngine(lambda: create_engine(spec, models))


def with_threads(spec: EngineSpec, num_threads: int | None) -> EngineSpec:
    """Return `spec` with `num_threads` CPU threads, unless its options say how many or take none.

    Raises `PoolError` for an unknown kind.
    """
    if num_threads is None or "num_threads" not in _kind(spec).options.model_fields:
        return spec
    options = {"num_threads": num_threads, **spec.options}
    return spec.model_copy(update={"options": options})


def adapter_kinds() -> tuple[str, ...]:
    """Return the kinds of engines that run adapters."""
    return tuple(name for name in KINDS.names() if KINDS.load(name).adapters)


def _kind(spec: EngineSpec) -> EngineKind[Any]:
    try:
        return KINDS.load(spec.kind)
    except PluginError as error:
        raise PoolError(f"engines.{spec.name}.kind: {error}") from None


def _read(spec: EngineSpec, models: Sequence[Model]) -> tuple[EngineKind[Any], BaseModel]:
    kind = _kind(spec)
    if spec.dtype not in kind.dtypes:
        raise PoolError(
            f"engines.{spec.name}.dtype: {spec.dtype!r} is not allowed for kind {spec.kind}; "
            f"allowed are {', '.join(kind.dtypes)}"
        )
    if spec.leads and not kind.leads:
        allowed = ", ".join(name for name in KINDS.names() if KINDS.load(name).leads)
        raise PoolError(
            f"engines.{spec.name}.leads: the kind {spec.kind} takes none; allowed is {allowed}"
        )
    for model in models:
        _check_checkpoint(spec, kind, model)
    try:
        return kind, kind.options.model_validate(spec.options)
    except ValidationError as error:
        raise PoolError(f"engines.{spec.name}.options: {explain(error)}") from None


def _check_checkpoint(spec: EngineSpec, kind: EngineKind[Any], model: Model) -> None:
    """Refuse a model that is nothing this kind can run."""
    where, what = f"models.{model.name}", f"the {spec.kind} engine {spec.name!r}"
    if kind.remote and model.spec.remote is None:
        raise PoolError(
            f"{where}: {what} asks another server and reads no checkpoint; give the key remote "
            "(a mapping, which may be empty)"
        )
    if model.spec.remote is not None and not kind.remote:
        raise PoolError(f"{where}.remote: {what} runs no remote models; one of kind remote does")
    if model.spec.base is not None and not kind.adapters:
        able = ", ".join(adapter_kinds())
        raise PoolError(f"{where}.adapter: {what} runs no adapters; engines of kind {able} do")
    if model.card is None:
        if kind.formats:
            raise PoolError(f"{where}.checkpoint: the key is missing; {what} needs one")
        return
    if not kind.formats:
        raise PoolError(f"{where}.checkpoint: {what} reads no checkpoint; remove it")
    found: Format = "gguf" if model.card.path.suffix == ".gguf" else "safetensors"
    if found not in kind.formats:
        raise PoolError(
            f"{where}.checkpoint: {what} does not read {found} ({model.card.path}); allowed are "
            f"{', '.join(kind.formats)}"
        )
