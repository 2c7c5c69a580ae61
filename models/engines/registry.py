"""Engine kinds by name: Shoal's own, and those of the entry point group `shoal.engines`.

And what keeps an engine of any kind running: one that has failed, as its `check_health` tells, is
stopped, and made and started anew (`SupervisedEngine`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from models.engines.base import Chunk, Engine, EngineStats, GenerationRequest, HasMetrics
from models.engines.kind import EngineKind, EngineTraits, Format
from models.errors import EngineFailed, PoolError
from models.spec import EngineSpec, Model
from policies.kinds import PluginError, Plugins, explain

logger = logging.getLogger(__name__)

_CHECK_S = 1.0
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0


class SupervisedEngine:
    """An engine that comes back; see `models.engines.base.Engine`.

    Its health is checked every `check_s`. After a failure it is started again, the first time at
    `first_wait_s`, then after twice as long each time, until it has been well for as long as it was
    last waited. Meanwhile requests and `check_health` raise `EngineFailed`.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        *,
        check_s: float = _CHECK_S,
        first_wait_s: float = _FIRST_WAIT_S,
    ) -> None:
        """`make` makes the engine, each time anew."""
        self._make = make
        self._check_s = check_s
        self._first_wait_s = first_wait_s
        self._engine = make()
        self._members = self._engine.members
        self._failure: EngineFailed | None = None
        self._num_restarts = 0
        self._watching: asyncio.Task[None] | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The models that the engine holds."""
        return self._members

    async def start(self) -> None:
        """Start it. What it raises the first time is not tried again."""
        await self._engine.start()
        self._watching = asyncio.create_task(self._watch())

    def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the engine's answer."""
        return self._engine.generate(request)

    def stats(self) -> EngineStats:
        """Return the engine's snapshot, and how often it was started again."""
        return replace(self._engine.stats(), restarts_total=self._num_restarts)

    def metrics(self) -> str:
        """Return its library's metrics; empty where it has none."""
        return self._engine.metrics() if isinstance(self._engine, HasMetrics) else ""

    def check_health(self) -> None:
        """Raise `EngineFailed` while the engine cannot serve, with why it failed."""
        if self._failure is not None:
            raise self._failure
        self._engine.check_health()

    async def stop(self) -> None:
        """Stop it for good; idempotent."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        await self._engine.stop()

    async def _watch(self) -> None:
        wait_s, well_s = self._first_wait_s, 0.0
        while True:
            await asyncio.sleep(self._check_s)
            try:
                self._engine.check_health()
                well_s += self._check_s
                if well_s >= wait_s:
                    wait_s = self._first_wait_s
                continue
            except EngineFailed as error:
                self._failure = EngineFailed(f"the engine is being started again: {error}")
                logger.error("an engine failed and is started again in %g s: %s", wait_s, error)
            await self._restart_after(wait_s)
            wait_s, well_s = min(2 * wait_s, _LONGEST_WAIT_S), 0.0

    async def _restart_after(self, wait_s: float) -> None:
        """Try once. What could not be started fails its next check of health."""
        try:
            await self._engine.stop()
            await asyncio.sleep(wait_s)
            self._engine = self._make()
            await self._engine.start()
        except Exception:  # whatever it is: it is tried again
            logger.exception("an engine could not be started again")
            return
        self._num_restarts += 1
        self._failure = None


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


def answering_options(spec: EngineSpec) -> dict[str, Any]:
    """Return those of the engine's options that may change what its models answer.

    Raises `PoolError` for an unknown kind.
    """
    beside = _kind(spec).beside_answers
    return {name: value for name, value in spec.options.items() if name not in beside}


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
