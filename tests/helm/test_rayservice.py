"""templates/rayservice.yaml: the cluster, and the application it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from models.pool import DEFAULT_POOL
from router.config import AppArgs
from tests.helm.helm_chart import EXAMPLES, RenderError, example, one, render
from tests.helm.kubernetes import check, pod_templates

PATHS = (f"pool.mountPath={DEFAULT_POOL}", f"pool.path={DEFAULT_POOL}")
POSTGRESQL = ("postgresql.host=db", "postgresql.secretName=pw")


def _service(*files: Path, sets: tuple[str, ...] = ()) -> dict[str, Any]:
    return one(render(*files, sets=sets), "rayservice.yaml")


def _serve_config(service: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def _args(service: dict[str, Any]) -> AppArgs:
    [application] = _serve_config(service)["applications"]
    return AppArgs.model_validate(application["args"])


@pytest.mark.parametrize("name", [None, *EXAMPLES])
def test_it_is_a_valid_rayservice(name: str | None) -> None:
    """The CRD and Kubernetes accept it, without one field that they would drop."""
    service = _service(*([example(name)] if name else []))
    check(service)
    assert service["metadata"]["name"] == "demo-shoal"


# Ray Serve's own modules use a deprecated feature of pydantic when they are first imported.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning")
@pytest.mark.parametrize("name", [None, *EXAMPLES])
def test_the_application_accepts_its_configuration(name: str | None) -> None:
    """Ray Serve accepts the config, and `router.app:build` builds what stands in it."""
    from ray.serve.schema import ServeDeploySchema

    from router.app import build

    service = _service(*([example(name)] if name else []), sets=PATHS)
    config = _serve_config(service)
    ServeDeploySchema.model_validate(config)
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    [application] = config["applications"]
    assert (application["import_path"], application["route_prefix"]) == ("router.app:build", "/")
    args = AppArgs.model_validate(application["args"])
    assert args.pool == DEFAULT_POOL
    assert build(args) is not None


def test_a_changed_chart_alone_brings_up_no_new_cluster() -> None:
    """Pods carry no version of the chart, and no name by which KubeRay's own services select."""
    for template in pod_templates(_service()):
        labels = set(template["metadata"]["labels"])
        assert labels == {
            "app.kubernetes.io/part-of",
            "app.kubernetes.io/instance",
            "app.kubernetes.io/component",
        }


def test_the_image_is_pinned() -> None:
    """By the chart's version, a tag, or a digest, which wins."""
    image = "sha256:" + "a" * 64
    for sets, expected in (
        ((), "shoal:0.1.0"),
        (("image.tag=0.2.0",), "shoal:0.2.0"),
        (("image.tag=0.2.0", f"image.digest={image}"), f"shoal@{image}"),
    ):
        for template in pod_templates(_service(sets=sets)):
            assert template["spec"]["containers"][0]["image"] == expected


def test_no_pod_is_root_or_writes_to_its_image() -> None:
    """Every container is unprivileged and read-only, with /tmp to write to."""
    for template in pod_templates(_service(example("eight-gpus"))):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec["initContainers"]]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
    autoscaler = _service()["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert autoscaler["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_head_runs_no_replica_and_gets_no_request() -> None:
    """It offers Ray no CPU and no GPU, and the API's service leaves it out."""
    service = _service()
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["num-gpus"] == "0"
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True


def test_gpu_workers_hold_their_gpus() -> None:
    """Kubernetes and Ray are told the same number; a CPU group asks for none."""
    http, gpu = _service(example("eight-gpus"))["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert gpu["rayStartParams"] == {"num-gpus": "1"}
    resources = gpu["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["nvidia.com/gpu"] == 1
    assert (gpu["minReplicas"], gpu["replicas"], gpu["maxReplicas"]) == (2, 2, 8)
    assert http["rayStartParams"] == {}
    assert "nvidia.com/gpu" not in http["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_more_ray_start_params() -> None:
    """Options of `ray start` stand beside the GPUs, as text."""
    values = "workerGroups:\n- {name: a, replicas: 1, gpus: 2, cpu: '1', memory: 1Gi, " \
        "rayStartParams: {resources: '{\"fast\": 1}'}}\n"  # fmt: skip
    file = Path(__file__).parent / "more.yaml"
    file.write_text(values)
    try:
        [group] = _service(file)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    finally:
        file.unlink()
    assert group["rayStartParams"] == {"num-gpus": "2", "resources": '{"fast": 1}'}


def test_probes_ask_ray_and_on_workers_the_proxy() -> None:
    """A head is alive while the GCS is; a worker is ready once its proxy serves."""
    head, worker = (template["spec"]["containers"][0] for template in pod_templates(_service()))
    for container in (head, worker):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert "local_raylet_healthz" in container[probe]["exec"]["command"][2]
        assert container["startupProbe"]["failureThreshold"] * 5 == 600
    assert "gcs_healthz" in head["livenessProbe"]["exec"]["command"][2]
    assert "8000/-/healthz" in worker["readinessProbe"]["exec"]["command"][2]
    assert "8000" not in worker["livenessProbe"]["exec"]["command"][2], "busy is not dead"


def test_a_pool_on_a_volume() -> None:
    """Head and workers mount the claim read-only, and the configuration points there."""
    sets = ("pool.source=pvc", "pool.pvc.claimName=models", "pool.pvc.subPath=mine")
    service = _service(sets=sets)
    check(service)
    for template in pod_templates(service):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        claim = volumes["pool"]["persistentVolumeClaim"]
        assert claim == {"claimName": "models", "readOnly": True}
        mounts = {
            mount["name"]: mount for mount in template["spec"]["containers"][0]["volumeMounts"]
        }
        assert mounts["pool"] == {
            "name": "pool",
            "mountPath": "/pool",
            "readOnly": True,
            "subPath": "mine",
        }
    assert _serve_config(service)["applications"][0]["args"]["pool"] == "/pool"


def test_a_pool_in_an_object_store() -> None:
    """Each pod copies it before Ray starts, with credentials from a secret, bounded in size."""
    service = _service(example("eight-gpus"))
    for template in pod_templates(service):
        [fetch] = template["spec"]["initContainers"]
        assert fetch["args"][0] == "copy"
        assert fetch["args"][-2:] == [
            ":s3,provider=AWS,env_auth=true,region=eu-central-1:my-bucket/pools/mine",
            "/pool",
        ]
        assert fetch["envFrom"] == [{"secretRef": {"name": "shoal-object-store"}}]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["pool"]["emptyDir"]["sizeLimit"] == "200Gi"


def test_a_pool_in_the_image() -> None:
    """No volume is needed; by default it is the pool that ships."""
    assert _args(_service()).pool == DEFAULT_POOL
    assert _args(_service(sets=("pool.path=/opt/mine",))).pool == Path("/opt/mine")


def test_the_database_password_stays_in_its_secret() -> None:
    """Pods read it from the secret into libpq's variable; the address has none."""
    service = _service(example("one-gpu"))
    ledger = _args(service).ledger
    assert ledger is not None
    assert ledger.url == "postgresql+psycopg://shoal@postgresql.databases.svc:5432/shoal"
    for template in pod_templates(service):
        env = {entry["name"]: entry for entry in template["spec"]["containers"][0]["env"]}
        secret = {"name": "shoal-postgresql", "key": "password"}
        assert env["PGPASSWORD"]["valueFrom"]["secretKeyRef"] == secret
        assert env["PGSSLMODE"]["value"] == "require"


def test_without_a_database_the_ledger_is_a_file_that_can_be_written() -> None:
    """It lies in /tmp, the only place to write to; other ledger settings stay."""
    ledger = _args(_service(sets=("config.ledger.keep_text=true",))).ledger
    assert ledger is not None
    assert (ledger.url, ledger.keep_text) == ("sqlite:////tmp/shoal.db", True)


def test_upgrades_in_steps() -> None:
    """The incremental strategy says how far and how often traffic moves; the default does not."""
    strategy = _service(example("eight-gpus"))["spec"]["upgradeStrategy"]
    assert strategy == {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {
            "gatewayClassName": "istio",
            "stepSizePercent": 10,
            "intervalSeconds": 60,
            "maxSurgePercent": 25,
        },
    }
    assert _service()["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


def test_the_old_cluster_outlives_what_it_still_answers() -> None:
    """It is deleted no earlier than its pods may take to finish."""
    service = _service()
    delay_s = service["spec"]["rayClusterDeletionDelaySeconds"]
    for template in pod_templates(service):
        assert delay_s >= template["spec"]["terminationGracePeriodSeconds"] >= 60


def test_a_pod_that_ends_answers_first_what_it_has() -> None:
    """Before SIGTERM, at which Ray ends, it waits, and less than its grace period."""
    for template in pod_templates(_service()):
        [container] = template["spec"]["containers"]
        program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        assert 10 <= int(seconds) < template["spec"]["terminationGracePeriodSeconds"]


def test_a_cluster_that_outlives_its_head() -> None:
    """With Redis, the cluster's state is kept there, the password in a secret."""
    options = _service(example("eight-gpus"))["spec"]["rayClusterConfig"][
        "gcsFaultToleranceOptions"
    ]
    assert options["redisAddress"] == "redis.databases.svc:6379"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "shoal-redis"
    assert "gcsFaultToleranceOptions" not in _service()["spec"]["rayClusterConfig"]


def test_rays_own_ports_ask_for_a_token() -> None:
    """Whoever may submit jobs runs code, so KubeRay draws a token unless told otherwise."""
    for sets, mode in (((), "token"), (("rayAuthentication=disabled",), "disabled")):
        cluster = _service(sets=sets)["spec"]["rayClusterConfig"]
        assert cluster["authOptions"] == {"mode": mode}


def test_only_the_head_may_ask_the_kubernetes_api() -> None:
    """The autoscaler beside it needs a token; workers get none."""
    head, worker = (template["spec"] for template in pod_templates(_service()))
    assert worker["automountServiceAccountToken"] is False
    assert "automountServiceAccountToken" not in head


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("config.ingress.max_replicas=2",), "cannot share an SQLite ledger"),
        (("keys.secretName=mine",), "keys.secretName: needs postgresql.host"),
        (("postgresql.host=db",), "postgresql.secretName"),
        ((*POSTGRESQL, "config.ledger.url=sqlite:////x.db"), "config.ledger.url: leave it out"),
        (("pool.source=pvc",), "pool.pvc.claimName"),
        (("pool.source=objectStore",), "pool.objectStore.remote"),
        (("upgrade.strategy=NewClusterWithIncrementalUpgrade",), "upgrade.gatewayClassName"),
    ],
)
def test_values_that_contradict_each_other_are_refused(sets: tuple[str, ...], message: str) -> None:
    """The message names the key and says what to do."""
    with pytest.raises(RenderError, match=message):
        render(sets=sets)


def test_several_workers_need_a_database() -> None:
    """A second worker's replicas could not read an SQLite file inside the first."""
    with pytest.raises(RenderError, match="cannot share an SQLite ledger"):
        render(example("eight-gpus"), sets=("postgresql.host=",))
