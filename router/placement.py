"""What Ray Serve is told of a deployment: how many replicas, and what of the cluster each holds.

A replica holds shares of CPU and GPU, or several GPUs together. Nothing here needs Ray.
"""

from __future__ import annotations

from typing import Any

from models.engines.kind import EngineTraits
from models.errors import PoolError
from models.spec import DeploymentSpec, EngineSpec

# Replicas take what comes: the engines bound their own queues, and say so in OpenAI's shape.
_MAX_ONGOING_REQUESTS = 10_000


def replicas(spec: DeploymentSpec) -> dict[str, Any]:
    """Return Ray Serve's options for how many replicas run, and how they are watched."""
    options: dict[str, Any] = {
        "max_ongoing_requests": _MAX_ONGOING_REQUESTS,
        # Three checks in a row that fail, or have no answer, are the end of a replica: so one that
        # stands still is replaced after five seconds, one that is gone after one.
        "health_check_period_s": 0.5,
        "health_check_timeout_s": 1.5,
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


def affinity(spec: DeploymentSpec) -> dict[str, Any]:
    """Return Ray Serve's options for which of an engine's replicas a request goes to."""
    if max(spec.min_replicas, spec.max_replicas) == 1:
        return {}
    return {"request_router_config": {"request_router_class": "router.affinity.AffinityRouter"}}


def placement(spec: EngineSpec, traits: EngineTraits) -> dict[str, Any]:
    """Return Ray Serve's options for where the replicas of the engine run.

    A replica of several workers on GPUs is a placement group: a bundle per worker, packed onto as
    few nodes as can be; the replica itself sits in the first one. Raises `PoolError` for a number
    of GPUs that its workers cannot share.
    """
    deployment = spec.deployment
    if not _spans_gpus(spec, traits):
        return single(deployment)
    gpus = deployment.num_gpus / traits.num_workers
    if gpus > 1:
        raise PoolError(
            f"engines.{spec.name}.deployment.num_gpus: {deployment.num_gpus:g} is more than one "
            f"for each of the {traits.num_workers} workers that the engine spreads over"
        )
    first = {"CPU": deployment.num_cpus, "GPU": gpus}
    return {
        "ray_actor_options": {
            "num_cpus": deployment.num_cpus,
            "num_gpus": 0,
            "runtime_env": {"env_vars": {"VLLM_RAY_PER_WORKER_GPUS": str(gpus)}},
        },
        "placement_group_bundles": [first, *[{"GPU": gpus}] * (traits.num_workers - 1)],
        "placement_group_strategy": "PACK",
    }


def single(deployment: DeploymentSpec) -> dict[str, Any]:
    """Return Ray Serve's options for a replica that is one process."""
    return {
        "ray_actor_options": {
            "num_cpus": deployment.num_cpus,
            "num_gpus": deployment.num_gpus,
        }
    }


def on_ray(spec: EngineSpec, traits: EngineTraits) -> EngineSpec:
    """Return `spec` as a replica gets it: its vLLM starts its workers in the placement group."""
    if not _spans_gpus(spec, traits):
        return spec
    engine_args = {"distributed_executor_backend": "ray", **spec.options.get("engine_args", {})}
    return spec.model_copy(update={"options": {**spec.options, "engine_args": engine_args}})


def _spans_gpus(spec: EngineSpec, traits: EngineTraits) -> bool:
    return traits.num_workers > 1 and spec.deployment.num_gpus > 0
