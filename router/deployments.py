"""The Ray Serve deployments: one per engine of the pool, and the ingress in front of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from models.engines.base import Chunk, EngineStats, GenerationRequest
from models.engines.registry import supervised_engine
from models.pool import found_here, load_pool
from models.spec import EngineSpec, Model
from policies.carbon.settings import CarbonSettings
from router.catalog.catalog import load_catalog
from router.compose import compose, open_ledger
from router.config import AppArgs
from router.energy import lane_meter
from router.engines.handle import HandleClient
from router.engines.worker import EngineWorker, set_num_threads
from router.ingress import create_api
from router.logs import set_up_logs


@serve.deployment
class EngineReplica:
    """One replica of one engine. Unhealthy replicas are replaced by Ray Serve."""

    async def __init__(  # type: ignore[misc] # Ray Serve awaits it
        self,
        spec: EngineSpec,
        models: tuple[Model, ...],
        num_threads: int | None,
        carbon: CarbonSettings,
    ) -> None:
        self._worker = EngineWorker(
            supervised_engine(spec, [found_here(model) for model in models]),
            lane_meter(carbon, spec),
        )
        set_num_threads(num_threads)
        await self._worker.start()

    async def complete(self, request: GenerationRequest) -> Chunk:
        """Return the whole answer as one chunk."""
        return await self._worker.complete(request)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Yield the answer as it is generated."""
        async for chunk in self._worker.stream(request):
            yield chunk

    async def settle(self, request_id: str) -> int:
        """Return how many tokens a cancelled request generated here."""
        return await self._worker.settle(request_id)

    async def metrics(self) -> list[tuple[str, str]]:
        """Return this replica's name and its library's own metrics."""
        return await self._worker.metrics()

    async def stats(self) -> EngineStats:
        """Return a snapshot."""
        return await self._worker.stats()

    async def check_health(self) -> None:
        """Raise if the engine cannot serve any more."""
        self._worker.check_health()

    async def __del__(self) -> None:
        """Stop the engine when Ray Serve takes the replica down."""
        if hasattr(self, "_worker"):
            await self._worker.stop()


@serve.deployment
@serve.ingress()
class Ingress:
    """Takes HTTP requests; every replica holds the whole routing state."""

    def __init__(self, args: AppArgs, engines: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._args = args
        set_up_logs(args.logs)
        pool = load_pool(args.pool)
        self._service = compose(
            args,
            pool,
            load_catalog(pool, policies=args.policies, carbon=args.carbon),
            engines={name: HandleClient(handle) for name, handle in engines.items()},
            ledger=open_ledger(args),
            echo_request_id=False,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application that this replica serves."""
        return create_api(
            self._service,
            dashboard=self._args.dashboard,
            caps=self._args.budgets.server_caps(),
        )
