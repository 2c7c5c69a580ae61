"""The Ray Serve application: `serve run router.app:build pool=...`, or `shoal serve`."""

# Not `from __future__ import annotations`: Ray Serve reads the type of `build`'s argument.

from typing import Any

from ray.serve import Application

from models.engines.registry import engine_traits
from models.errors import PoolError
from models.pool import load_pool
from models.spec import DeploymentSpec
from router.catalog.catalog import load_catalog
from router.compose import check_experiments
from router.config import AppArgs
from router.deployments import EngineReplica, Ingress
from router.engines.placement import on_ray, placement, single

# Replicas take what comes: the engines bound their own queues, and say so in OpenAI's shape.
_MAX_ONGOING_REQUESTS = 10_000


def build(args: AppArgs) -> Application:
    """Return the application of one pool: an ingress, and a deployment per engine.

    Raises `PoolError`, `PolicyError` or `LedgerError` if the pool, a policy, an experiment or the
    ledger cannot be used.
    """
    args = args.model_copy(update={"pool": args.pool.resolve()})
    pool = load_pool(args.pool)
    # Find mistakes here, not in a replica.
    check_experiments(args, pool, load_catalog(pool, policies=args.policies, carbon=args.carbon))
    engines = {}
    for spec in pool.engines:
        models = pool.models_of(spec.name)
        traits = engine_traits(spec, models)
        if traits.needs is not None:
            raise PoolError(f"engines.{spec.name}: {traits.needs}")
        engines[spec.name] = EngineReplica.options(  # type: ignore[attr-defined]
            name=f"engine-{spec.name}", **_options(spec.deployment), **placement(spec, traits)
        ).bind(on_ray(spec, traits), models, args.num_threads, args.carbon)
    ingress: Application = Ingress.options(  # type: ignore[attr-defined]
        name="ingress", **_options(args.ingress), **single(args.ingress)
    ).bind(args, engines)
    return ingress


def _options(spec: DeploymentSpec) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_ongoing_requests": _MAX_ONGOING_REQUESTS,
        "health_check_period_s": 5,
        "health_check_timeout_s": 15,
        "graceful_shutdown_timeout_s": spec.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": {"enable_access_log": False},
    }
    if spec.max_replicas > spec.min_replicas:
        options["autoscaling_config"] = {
            "min_replicas": spec.min_replicas,
            "max_replicas": spec.max_replicas,
            "target_ongoing_requests": spec.target_ongoing_requests,
        }
    else:
        options["num_replicas"] = spec.min_replicas
    return options
