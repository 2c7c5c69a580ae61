"""templates/{podmonitor,servicemonitor,metrics-service,prometheusrule,dashboards}.yaml."""

from __future__ import annotations

import json

import yaml

from tests.helm.helm_chart import CHART, example, one, render
from tests.helm.kubernetes import check, pod_templates

GPU = example("one-gpu")
TEMPLATES = (
    "podmonitor.yaml",
    "servicemonitor.yaml",
    "metrics-service.yaml",
    "prometheusrule.yaml",
    "dashboards.yaml",
)


def test_nothing_of_it_is_there_unless_asked_for() -> None:
    """A cluster without the Prometheus operator can install the chart."""
    assert not set(TEMPLATES) & set(render())


def test_the_pod_monitor_finds_every_ray_pod() -> None:
    """Its selector matches head and workers, and its port is one of theirs; no job's pod."""
    manifests = render(GPU)
    monitor = one(manifests, "podmonitor.yaml")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    [expression] = monitor["spec"]["selector"]["matchExpressions"]
    assert expression["operator"] == "In"
    for template in pod_templates(one(manifests, "rayservice.yaml")):
        labels = template["metadata"]["labels"]
        assert wanted <= labels.items()
        assert labels[expression["key"]] in expression["values"]
        ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        assert endpoint["port"] in ports
    job = one(manifests, "keys-job.yaml")["spec"]["template"]["metadata"]["labels"]
    assert job[expression["key"]] not in expression["values"]


def test_the_service_monitor_has_one_target_and_an_admins_key() -> None:
    """It finds the metrics service, which is the head's alone, and sends the key of a secret."""
    manifests = render(GPU)
    service = one(manifests, "metrics-service.yaml")
    check(service)
    monitor = one(manifests, "servicemonitor.yaml")
    assert monitor["kind"] == "ServiceMonitor"
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()
    [endpoint] = monitor["spec"]["endpoints"]
    assert (endpoint["path"], endpoint["port"]) == ("/metrics", service["spec"]["ports"][0]["name"])
    assert endpoint["authorization"] == {
        "type": "Bearer",
        "credentials": {"name": "shoal-keys", "key": "me.admin"},
    }
    head, *workers = pod_templates(one(manifests, "rayservice.yaml"))
    chosen = service["spec"]["selector"].items()
    assert chosen <= head["metadata"]["labels"].items()
    assert not any(chosen <= worker["metadata"]["labels"].items() for worker in workers)


def test_every_rule_file_becomes_a_prometheus_rule() -> None:
    """Rules arrive as they are in the files, Prometheus' own templates included."""
    rules = render(GPU)["prometheusrule.yaml"]
    files = sorted((CHART / "rules").glob("*.yaml"))
    assert files
    assert [rule["metadata"]["name"] for rule in rules] == [
        f"demo-shoal-{file.stem}" for file in files
    ]
    for rule, file in zip(rules, files, strict=True):
        assert rule["kind"] == "PrometheusRule"
        assert rule["spec"] == yaml.safe_load(file.read_text())


def test_every_dashboard_becomes_a_config_map() -> None:
    """Grafana's sidecar finds them by label; their JSON is unchanged and fits a ConfigMap."""
    maps = render(GPU)["dashboards.yaml"]
    files = sorted((CHART / "dashboards").glob("*.json"))
    assert files
    for config_map, file in zip(maps, files, strict=True):
        check(config_map)
        assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
        [(name, text)] = config_map["data"].items()
        assert name == f"shoal-{file.name}"
        assert json.loads(text) == json.loads(file.read_text())
        assert len(text) < 2**20
