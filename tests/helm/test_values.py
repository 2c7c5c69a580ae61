"""values.yaml, values.schema.json and the examples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from router.config import AppArgs
from tests.helm.helm_chart import CHART, EXAMPLES, example, render
from tests.helm.kubernetes import check

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def _merged(base: Any, over: Any) -> Any:
    """Merge as helm does: mappings by key, everything else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {key: _merged(base.get(key), over.get(key, base.get(key))) for key in base | over}
    return over


def _with(path: str, value: Any) -> dict[str, Any]:
    over: Any = value
    for key in reversed(path.split(".")):
        over = {key: over}
    merged: dict[str, Any] = _merged(VALUES, over)
    return merged


def test_the_schema_is_one_and_accepts_the_defaults() -> None:
    """helm checks every install against it."""
    VALIDATOR.check_schema(SCHEMA)
    VALIDATOR.validate(VALUES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_fit_the_schema_and_render_to_valid_manifests(name: str) -> None:
    """Each of the three can be installed as it is."""
    VALIDATOR.validate(_merged(VALUES, yaml.safe_load(example(name).read_text())))
    kinds = set()
    for manifests in render(example(name)).values():
        for manifest in manifests:
            check(manifest)
            kinds.add(manifest["kind"])
            labels = manifest["metadata"]["labels"]
            assert labels["app.kubernetes.io/instance"] == "demo"
            assert labels["helm.sh/chart"] == "shoal-0.1.0"
    assert {"RayService", "ConfigMap", "NetworkPolicy"} <= kinds


def _undescribed(schema: Any, path: str = "") -> Iterator[str]:
    for name, part in schema.get("properties", {}).items():
        if not part.get("description", "").strip().endswith("."):
            yield f"{path}{name}"
        yield from _undescribed(part, f"{path}{name}.")
        yield from _undescribed(part.get("items", {}), f"{path}{name}[].")


def _unknown(values: Any, schema: Any, path: str = "") -> Iterator[str]:
    properties = schema.get("properties", {})
    for name, value in values.items():
        if name not in properties:
            if properties:
                yield f"{path}{name}"
        elif isinstance(value, dict):
            yield from _unknown(value, properties[name], f"{path}{name}.")


def test_every_value_is_described() -> None:
    """Whatever values.yaml has stands in the schema, with a sentence."""
    assert list(_undescribed(SCHEMA)) == []
    assert list(_unknown(VALUES, SCHEMA)) == []


def test_the_configuration_it_describes_is_the_servers() -> None:
    """No key of `config` is described that the server doesn't have."""
    described = set(SCHEMA["properties"]["config"]["properties"])
    assert described <= set(AppArgs.model_fields) - {"pool"}
    assert {"auth", "budgets", "carbon", "dashboard", "experiments", "ingress"} <= described


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("imag", {}),
        ("image.tag", "latest"),
        ("image.digest", "sha256:short"),
        ("image.pullPolicy", "Sometimes"),
        ("pool.source", "ftp"),
        ("pool.mountPath", "relative"),
        ("pool.objectStore.image", "rclone/rclone"),
        ("pool.objectStore.image", "rclone/rclone:latest"),
        ("postgresql.port", 0),
        ("postgresql.sslMode", "maybe"),
        ("postgresql.password", "hunter2"),
        ("keys.secretName", "Not A Name"),
        ("workerGroups", []),
        ("workerGroups", [{"name": "a", "replicas": 1}]),
        ("workerGroups", [{"name": "A!", "replicas": 1, "cpu": "1", "memory": "1Gi"}]),
        ("workerGroups", [{"name": "a", "replicas": -1, "cpu": "1", "memory": "1Gi"}]),
        ("workerGroups", [{"name": "a", "replicas": 1, "cpu": "1", "memory": "1Gi", "gpu": 1}]),
        ("workerGroups", [{"name": "a", "replicas": 1, "cpu": "one", "memory": "1Gi"}]),
        ("workerGroups", [{"name": "a", "replicas": 1, "cpu": "1", "memory": "1 gigabyte"}]),
        ("head.memory", "4GB"),
        ("service.type", "ExternalName"),
        ("upgrade.strategy", "InPlace"),
        ("upgrade.stepSizePercent", 0),
        ("upgrade.maxSurgePercent", 101),
        ("gcsFaultTolerance.redisAddress", "redis"),
        ("podDisruptionBudget.maxUnavailable", "some"),
        ("monitoring.interval", "often"),
        ("monitoring.rules", "yes"),
        ("config.dashboard.access", "everybody"),
        ("config.dashboard.open", True),
        ("config.ingress.min_replicas", 0),
        ("config.num_threads", "two"),
        ("rayVersion", "2.60"),
        ("rayAuthentication", "none"),
    ],
)
def test_bad_values_are_refused(path: str, value: Any) -> None:
    """A typo, a wrong type, an unpinned image or a password in the clear stops the install."""
    assert list(VALIDATOR.iter_errors(_with(path, value))), f"{path}: {value} was accepted"


def test_a_config_in_the_clear_holds_no_secret() -> None:
    """Nothing that is rendered from an example carries a password or an API key."""
    for name in EXAMPLES:
        text = json.dumps(render(example(name))["rayservice.yaml"])
        assert "sk-shoal-" not in text
        assert "@" in text if name != "cpu-demo" else True
        assert ":password@" not in text
