"""The application on Ray Serve: `serve run router.app:build pool=...`, or `shoal serve`.

A deployment per engine of the pool, and the ingress in front of them. An engine that only asks
another server runs in the ingress's replicas, unless the pool file gives it a deployment.
"""

# Not `from __future__ import annotations`: Ray Serve reads the type of `build`'s argument.

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from models.engines.base import EngineStats
from models.engines.registry import engine_traits, with_threads
from models.errors import PoolError
from models.pool import load_pool
from router.compose import check_experiments, compose, open_ledger, settle_in
from router.config import AppArgs
from router.editions import catalog_of
from router.ingress import create_api
from router.logs import set_up_logs
from router.placement import affinity, on_ray, placement, replicas, single
from router.replica import EngineReplica, HandleClient, IngressEngine


def build(args: AppArgs) -> Application:
    """Return the application of one pool: an ingress, and a deployment per engine.

    Raises `PoolError`, `PolicyError` or `LedgerError` if the pool, a policy, an experiment or the
    ledger cannot be used.
    """
    args = args.model_copy(update={"pool": args.pool.resolve()}).started()
    pool = load_pool(args.pool)
    # Find mistakes here, not in a replica.
    check_experiments(args, pool, catalog_of(args, pool))
    engines = {}
    for spec in pool.engines:
        models = pool.loaded_by(spec.name)
        traits = engine_traits(spec, models)
        if traits.needs is not None:
            raise PoolError(f"engines.{spec.name}: {traits.needs}")
        if not traits.here and "deployment" not in spec.model_fields_set:
            continue
        engines[spec.name] = EngineReplica.options(  # type: ignore[attr-defined]
            name=f"engine-{spec.name}",
            **replicas(spec.deployment),
            **affinity(spec.deployment),
            **placement(spec, traits),
        ).bind(
            with_threads(on_ray(spec, traits), args.num_threads),
            models,
            args.num_threads,
            args.metering,
        )
    ingress: Application = Ingress.options(  # type: ignore[attr-defined]
        name="ingress", **replicas(args.ingress), **single(args.ingress)
    ).bind(args, engines)
    return ingress


@serve.deployment
@serve.ingress()
class Ingress:
    """Takes HTTP requests; every replica holds the whole routing state."""

    def __init__(self, args: AppArgs, engines: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._args = args
        set_up_logs(args.logs)
        pool = load_pool(args.pool)
        self._own = {
            spec.name: IngressEngine(spec, pool.loaded_by(spec.name))
            for spec in pool.engines
            if spec.name not in engines
        }
        self._service = compose(
            args,
            pool,
            catalog_of(args, pool),
            engines={**self._own, **{name: HandleClient(one) for name, one in engines.items()}},
            ledger=open_ledger(args),
            echo_request_id=False,
        )
        for engine in self._own.values():
            self._service.run_beside(engine)
        settle_in()

    async def own_stats(self, name: str) -> EngineStats:
        """Return a snapshot of an engine that runs in this replica."""
        return await self._own[name].own_stats()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application that this replica serves."""
        return create_api(self._service, self._args)
