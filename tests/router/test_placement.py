"""What of a cluster a replica asks Ray for."""

from typing import Any

import pytest

from models.engines.kind import EngineTraits
from models.errors import PoolError
from models.spec import EngineSpec
from router.placement import on_ray, placement

TWO = EngineTraits(num_workers=2)


def _spec(**deployment: Any) -> EngineSpec:
    return EngineSpec.model_validate(
        {
            "name": "e",
            "kind": "vllm",
            "options": {"engine_args": {"tensor_parallel_size": 2}},
            "deployment": deployment,
        }
    )


def test_a_replica_of_one_worker_is_an_actor() -> None:
    """It holds its shares of CPU and GPU, and its engine's arguments stay as they are."""
    spec = _spec(num_gpus=0.5, num_cpus=2)
    options = placement(spec, EngineTraits())
    assert options == {"ray_actor_options": {"num_cpus": 2, "num_gpus": 0.5}}
    assert on_ray(spec, EngineTraits()) is spec


def test_tensor_parallel_workers_get_a_bundle_each() -> None:
    """The replica sits in the first bundle without a GPU of its own; vLLM starts workers on Ray."""
    spec = _spec(num_gpus=2, num_cpus=1)
    options = placement(spec, TWO)
    assert options["placement_group_bundles"] == [{"CPU": 1, "GPU": 1}, {"GPU": 1}]
    assert options["ray_actor_options"]["num_gpus"] == 0
    args = on_ray(spec, TWO).options["engine_args"]
    assert args == {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}


def test_workers_may_share_gpus() -> None:
    """Half a GPU each: vLLM's workers ask Ray for as much as their bundles hold."""
    options = placement(_spec(num_gpus=1), TWO)
    assert [bundle["GPU"] for bundle in options["placement_group_bundles"]] == [0.5, 0.5]
    environment = options["ray_actor_options"]["runtime_env"]["env_vars"]
    assert environment == {"VLLM_RAY_PER_WORKER_GPUS": "0.5"}


def test_on_cpu_the_workers_are_processes() -> None:
    """Without GPUs there is nothing to place."""
    spec = _spec()
    assert "placement_group_bundles" not in placement(spec, TWO)
    assert on_ray(spec, TWO) is spec


def test_more_gpus_than_workers_are_refused() -> None:
    """A worker drives one device."""
    with pytest.raises(PoolError, match=r"num_gpus: 3 is more than one for each of the 2 workers"):
        placement(_spec(num_gpus=3), TWO)
