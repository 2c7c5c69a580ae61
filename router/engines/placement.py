"""What of the cluster an engine's replica holds: shares of CPU and GPU, several GPUs together."""

from __future__ import annotations

from typing import Any

from models.engines.kind import EngineTraits
from models.errors import PoolError
from models.spec import DeploymentSpec, EngineSpec


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
