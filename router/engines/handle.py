"""An engine that runs as a Ray Serve deployment, as the executor sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from models.engines.base import Chunk, EngineStats, GenerationRequest
from models.errors import EngineError, EngineFailed, EngineOverloaded, RequestError

_TIMEOUT_S = 5.0


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

    async def settle(self, request_id: str) -> int:
        """Return how many tokens a cancelled request generated; asks every replica."""
        with _translated():
            answers = self._handle.broadcast("settle", request_id)
            counts = await answers.results_async(timeout_s=_TIMEOUT_S)
            return max(counts, default=0)

    async def metrics(self) -> list[tuple[str, str]]:
        """Return every replica's name and its library's own metrics."""
        with _translated():
            answers = self._handle.broadcast("metrics")
            found = await answers.results_async(timeout_s=_TIMEOUT_S)
            return [entry for entries in found for entry in entries]

    async def stats(self) -> EngineStats:
        """Return the sum over the replicas."""
        with _translated():
            answers = self._handle.broadcast("stats")
            snapshots = await answers.results_async(timeout_s=_TIMEOUT_S)
            if not snapshots:
                raise EngineFailed(f"{self._handle.deployment_name} has no replica")
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
