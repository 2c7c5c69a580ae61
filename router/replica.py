"""One replica of one engine on Ray Serve, and what calls it; and an engine that needs none.

It is apart from the application because a process that imports less is there sooner: a replica that
was killed is replaced by a new process.
"""

# Not `from __future__ import annotations`: Ray Serve reads the types of what it starts.

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from models.engines.base import Chunk, EngineStats, GenerationRequest
from models.engines.registry import supervised_engine
from models.errors import EngineError, EngineFailed, EngineOverloaded, RequestError
from models.pool import found_here
from models.spec import EngineSpec, Model
from policies.carbon.settings import CarbonSettings
from router.energy import LaneMeters
from router.engines import EngineWorker, Used, set_num_threads

_BROADCAST_TIMEOUT_S = 5.0


@serve.deployment
class EngineReplica(EngineWorker):
    """One replica of one engine. Unhealthy replicas are replaced by Ray Serve."""

    async def __init__(  # type: ignore[misc] # Ray Serve awaits it
        self,
        spec: EngineSpec,
        models: tuple[Model, ...],
        num_threads: int | None,
        carbon: CarbonSettings,
    ) -> None:
        engine = supervised_engine(spec, [found_here(model) for model in models])
        super().__init__(engine, LaneMeters(carbon).of(spec))
        set_num_threads(num_threads)
        await self.start()

    async def __del__(self) -> None:
        """Stop the engine when Ray Serve takes the replica down."""
        if hasattr(self, "_engine"):
            await self.stop()


class HandleClient:
    """Calls one engine's deployment; Ray Serve picks the replica.

    A whole answer is one call, which costs a fraction of a stream. What no replica's engine raised
    itself becomes `EngineFailed`: a replica that died, or a deployment that isn't there.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._complete = handle.complete
        self._stream = handle.options(stream=True).stream

    async def complete(self, request: GenerationRequest) -> Chunk:
        """Return the whole answer as one chunk."""
        with _translated():
            response = self._complete.remote(request)
            try:
                answer = await response
            except asyncio.CancelledError:
                response.cancel()  # type: ignore[no-untyped-call]
                raise
            assert isinstance(answer, Chunk)
            return answer

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is generated."""
        finished = False
        with _translated():
            chunks = self._stream.remote(request)
            assert isinstance(chunks, DeploymentResponseGenerator)
            try:
                async for chunk in chunks:
                    finished = chunk.finish_reason is not None
                    yield chunk
            finally:
                if not finished:
                    chunks.cancel()  # type: ignore[no-untyped-call]

    async def settle(self, request_id: str) -> Used:
        """Return what a cancelled request used; asks every replica."""
        with _translated():
            answers = self._handle.broadcast("settle", request_id)
            found = await answers.results_async(timeout_s=_BROADCAST_TIMEOUT_S)
            return max(found, key=lambda used: (used.num_tokens, bool(used.energy)), default=Used())

    async def metrics(self) -> list[tuple[str, str]]:
        """Return every replica's name and its library's own metrics."""
        with _translated():
            answers = self._handle.broadcast("metrics")
            found = await answers.results_async(timeout_s=_BROADCAST_TIMEOUT_S)
            return [entry for entries in found for entry in entries]

    async def stats(self) -> EngineStats:
        """Return the sum over the replicas."""
        return await _stats_of_all(self._handle, "stats")


class IngressEngine(EngineWorker):
    """An engine of another server's models, in a replica of the ingress: no hop leads to it.

    Every replica has its own, with its own connections and circuits; `stats` are those of all.
    """

    def __init__(self, spec: EngineSpec, models: tuple[Model, ...]) -> None:
        super().__init__(supervised_engine(spec, models))
        self._name = spec.name

    async def stats(self) -> EngineStats:
        """Return the sum over the replicas of the ingress."""
        context = serve.get_replica_context()
        ingress = serve.get_deployment_handle(context.deployment, context.app_name)
        return await _stats_of_all(ingress, "own_stats", self._name)

    async def own_stats(self) -> EngineStats:
        """Return a snapshot of what is here."""
        return await super().stats()


async def _stats_of_all(handle: DeploymentHandle[Any], method: str, *names: str) -> EngineStats:
    with _translated():
        answers = handle.broadcast(method, *names)
        snapshots = await answers.results_async(timeout_s=_BROADCAST_TIMEOUT_S)
        if not snapshots:
            raise EngineFailed(f"{handle.deployment_name} has no replica")
        return EngineStats.total(snapshots)


@contextmanager
def _translated() -> Iterator[None]:
    """Raise what the engine raised, without Ray's wrapping."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, EngineError | RequestError):
            raise error.cause from None
        raise EngineFailed(f"an engine's replica failed: {error.cause!r}") from error
    except BackPressureError as error:
        raise EngineOverloaded(str(error)) from None
    except (RayActorError, DeploymentUnavailableError) as error:
        raise EngineFailed("an engine's replica died") from error
    except RayError as error:
        raise EngineFailed(f"an engine cannot be reached: {error}") from error
