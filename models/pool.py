"""The pool: which models there are and which engine runs each, read from `pool.yaml`.

The file is validated whole when it loads, so that a mistake shows at start and not at the first
request. It also carries the specifications of the pool's policies and scorers, which it does not
interpret.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from models.adapter import read_adapter
from models.card import read_card
from models.engines.registry import engine_traits
from models.errors import PoolError
from models.sources.locate import locate
from models.spec import EngineSpec, Model, ModelSpec, PoolFile, RemoteModelSpec, SamplingSpec
from policies.base import ModelFacts
from policies.kinds import explain, read_yaml

# Beside the pool file: which commits its Hub sources stand for (see `sources.locate`).
LOCK = "pool.lock"

DEFAULT_POOL = Path(__file__).parent / "pools" / "default"


@dataclass(frozen=True, kw_only=True)
class Absent:
    """Why this machine cannot have a model, and which one of the pool stands in for it."""

    why: str
    otherwise: str


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A validated pool. `folder` is where relative paths in the file start.

    `absent` are the file's models that this machine does without, by name; `models` and `engines`
    hold the others.
    """

    name: str
    folder: Path
    engines: tuple[EngineSpec, ...]
    models: tuple[Model, ...]
    policies: dict[str, dict[str, Any]]
    scorers: dict[str, dict[str, Any]]
    absent: dict[str, Absent] = field(default_factory=dict)

    def model(self, name: str) -> Model:
        """Return the model called `name`; `KeyError` if there is none."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(name)

    def engine_of(self, model: str) -> EngineSpec:
        """Return the engine that runs the model called `model`."""
        wanted = self.model(model).spec.engine
        return next(engine for engine in self.engines if engine.name == wanted)

    @property
    def adapters(self) -> dict[str, ModelSpec]:
        """The specifications of those models that are adapters, by name."""
        return {model.name: model.spec for model in self.models if model.adapter is not None}

    def models_of(self, engine: str) -> tuple[Model, ...]:
        """Return the models that the engine called `engine` runs, adapters after their base."""
        return tuple(model for model in self.models if model.spec.engine == engine)

    def loaded_by(self, engine: str) -> tuple[Model, ...]:
        """Return the models that the engine called `engine` loads: its own, then its leads."""
        spec = next(spec for spec in self.engines if spec.name == engine)
        return (*self.models_of(engine), *(m for m in self.models if m.name in spec.leads))

    def facts(self) -> dict[str, ModelFacts]:
        """Return what policies may know about every model, by name."""
        return {model.name: model.facts() for model in self.models}


def found_here(model: Model) -> Model:
    """Return `model` as this machine has it, which may not be the one that read the pool.

    What a Hub or a package brings along is looked for again, by the same commit, and fetched if
    it must be; folders and files are where the pool says. Adapters are looked for when an engine
    loads them. Raises `PoolError`.
    """
    if model.card is None:
        return model
    found = locate(model.card.source, folder=Path())
    card = replace(model.card, path=found.path)
    return replace(model, card=card, tokenizer=found.path)


def pool_file(path: Path | str) -> Path:
    """Return the pool file that `path` names: itself, or the pool.yaml in a folder."""
    file = Path(path)
    return file / "pool.yaml" if file.is_dir() else file


def load_pool(path: Path | str) -> Pool:
    """Read and validate a pool from `path`, a pool.yaml or the folder that holds one.

    Raises `PoolError` that names the file, the key, the value and what is allowed.
    """
    file = pool_file(path)
    if not file.is_file():
        raise PoolError(f"there is no pool file at {file}")
    content = read_yaml(file, PoolFile, refused=PoolError)
    _check_names(file, content)
    absent = _find_absent(file, content)
    models = [spec for spec in content.models if spec.name not in absent]
    used = {spec.engine for spec in models}
    pool = Pool(
        name=content.name,
        folder=file.parent,
        engines=tuple(engine for engine in content.engines if engine.name in used),
        models=_load_models(file, models),
        policies=content.policies,
        scorers=content.scorers,
        absent=absent,
    )
    for engine in pool.engines:
        try:
            engine_traits(engine, pool.loaded_by(engine.name))
        except PoolError as error:
            raise PoolError(f"{file}: {error}") from None
    return pool


def with_adapters(pool: Pool, specs: Sequence[ModelSpec]) -> Pool:
    """Return `pool` with the adapters that `specs` describe in place of all that it has.

    Their files are read again. Raises `PoolError`.
    """
    bases = {model.name: model for model in pool.models if model.adapter is None}
    adapters = [
        load_adapter(spec, bases, folder=pool.folder, where=f"models.{spec.name}") for spec in specs
    ]
    changed = replace(pool, models=(*bases.values(), *adapters))
    for engine in changed.engines:
        engine_traits(engine, changed.loaded_by(engine.name))
    return changed


def _check_names(file: Path, content: PoolFile) -> None:
    for what, names in (
        ("engines", [engine.name for engine in content.engines]),
        ("models", [model.name for model in content.models]),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                raise PoolError(f"{file}: {what}: the name {name!r} is used {count} times")
    engines = {engine.name for engine in content.engines}
    for model in content.models:
        if model.engine not in engines:
            raise PoolError(
                f"{file}: models.{model.name}.engine: {model.engine!r} is unknown; "
                f"allowed are {', '.join(sorted(engines))}"
            )
        if model.name == "auto":
            raise PoolError(f"{file}: models: the name 'auto' is reserved for the default policy")
        others = [other.name for other in content.models if other is not model]
        if model.otherwise is not None and model.otherwise not in others:
            raise PoolError(
                f"{file}: models.{model.name}.otherwise: {model.otherwise!r} is unknown; allowed "
                f"are {', '.join(others)}"
            )
    for engine in content.engines:
        others = [model.name for model in content.models if model.engine != engine.name]
        for lead in engine.leads:
            if lead not in others or engine.leads.count(lead) > 1:
                raise PoolError(
                    f"{file}: engines.{engine.name}.leads: {lead!r} is no model of another engine, "
                    f"or named twice; allowed are {', '.join(others) or 'none of this pool'}"
                )
    used = {model.engine for model in content.models}
    for name in sorted(engines - used):
        raise PoolError(f"{file}: engines.{name} runs no model; give it one or remove it")


def _find_absent(file: Path, content: PoolFile) -> dict[str, Absent]:
    absent = {
        spec.name: Absent(why=why, otherwise=spec.otherwise)
        for spec in content.models
        if spec.otherwise is not None and (why := _hindrance(file, content, spec)) is not None
    }
    for name, model in absent.items():
        if model.otherwise in absent:
            raise PoolError(
                f"{file}: models.{name}.otherwise: {model.otherwise!r} cannot be had here either: "
                f"{absent[model.otherwise].why}"
            )
    return absent


def _hindrance(file: Path, content: PoolFile, spec: ModelSpec) -> str | None:
    """Say what keeps this machine from having a model; None where nothing does.

    A checkpoint that is there and cannot be read is no reason to do without it, but an error.
    """
    for source in (spec.checkpoint, spec.adapter):
        try:
            if source is not None:
                locate(source, folder=file.parent, lock=file.parent / LOCK)
        except PoolError as error:
            return str(error)
    engine = next(engine for engine in content.engines if engine.name == spec.engine)
    bases = [model for model in content.models if model.name == spec.base]
    try:
        return engine_traits(engine, _load_models(file, [*bases, spec])).needs
    except PoolError:  # said with its place when the engine is checked with all its models
        return None


def _load_models(file: Path, specs: Sequence[ModelSpec]) -> tuple[Model, ...]:
    """Load models in their order, then their adapters."""
    bases = {spec.name: _load_model(file, spec) for spec in specs if not _is_adapter(spec)}
    adapters = [
        load_adapter(spec, bases, folder=file.parent, where=f"{file}: models.{spec.name}")
        for spec in specs
        if _is_adapter(spec)
    ]
    return (*bases.values(), *adapters)


def _is_adapter(spec: ModelSpec) -> bool:
    return spec.base is not None or spec.adapter is not None


def load_adapter(spec: ModelSpec, bases: Mapping[str, Model], *, folder: Path, where: str) -> Model:
    """Return the model that an adapter of one of `bases` is; `where` is named in errors.

    Raises `PoolError` for one that is not that base's, or computes what no engine here does.
    """
    for key, value in (("base", spec.base), ("adapter", spec.adapter)):
        if value is None:
            raise PoolError(f"{where}.{key}: the key is missing; an adapter needs it")
    for key in ("checkpoint", "remote"):
        if getattr(spec, key) is not None:
            raise PoolError(f"{where}.{key}: an adapter has its base's; remove it")
    assert spec.base is not None and spec.adapter is not None
    able = [name for name, base in bases.items() if base.card is not None and not base.card.is_gguf]
    if spec.base not in able:
        raise PoolError(
            f"{where}.base: {spec.base!r} is no model with a folder of safetensors; allowed are "
            f"{', '.join(able) or 'none of this pool'}"
        )
    base = bases[spec.base]
    if spec.engine != base.spec.engine:
        raise PoolError(
            f"{where}.engine: {spec.engine!r} is not allowed; an adapter runs where its base does, "
            f"on {base.spec.engine}"
        )
    assert base.card is not None
    try:
        found = locate(spec.adapter, folder=folder, lock=folder / LOCK)
        adapter = read_adapter(found.path, base.card.path, source=found.source)
    except PoolError as error:
        raise PoolError(f"{where}.adapter: {error}") from None
    return Model(spec=spec, card=base.card.adapted(adapter), tokenizer=base.tokenizer)


def _load_model(file: Path, spec: ModelSpec) -> Model:
    if spec.remote is not None:
        return _load_remote(file, spec, spec.remote)
    if spec.checkpoint is None:
        return Model(spec=spec, card=None)
    try:
        found = locate(spec.checkpoint, folder=file.parent, lock=file.parent / LOCK)
        card = read_card(found.path, source=found.source)
        model = Model(spec=spec, card=card, tokenizer=found.path)
        SamplingSpec.model_validate(model.sampling)
    except PoolError as error:
        raise PoolError(f"{file}: models.{spec.name}.checkpoint: {error}") from None
    except ValidationError as error:
        raise PoolError(
            f"{file}: models.{spec.name}.checkpoint: {found.path} asks for answers drawn as no "
            f"request may be: {explain(error)}; set generation_config: false to do without"
        ) from None
    return model


def _load_remote(file: Path, spec: ModelSpec, remote: RemoteModelSpec) -> Model:
    where = f"{file}: models.{spec.name}"
    if spec.checkpoint is not None:
        raise PoolError(f"{where}: a model has a checkpoint or is remote, not both")
    if remote.tokenizer is None:
        return Model(spec=spec, card=None)
    try:
        found = locate(remote.tokenizer, folder=file.parent, lock=file.parent / LOCK)
    except PoolError as error:
        raise PoolError(f"{where}.remote.tokenizer: {error}") from None
    if found.path.is_dir() and not (found.path / "tokenizer.json").is_file():
        raise PoolError(f"{where}.remote.tokenizer: there is no {found.path / 'tokenizer.json'}")
    return Model(spec=spec, card=None, tokenizer=found.path)
