"""templates/networkpolicy.yaml: who may reach what."""

from __future__ import annotations

from typing import Any

from tests.helm.helm_chart import example, one, render
from tests.helm.kubernetes import check, pod_templates

TEMPLATE = "networkpolicy.yaml"


def _ports(rule: dict[str, Any]) -> list[int]:
    return [port["port"] for port in rule.get("ports", [])]


def test_it_covers_every_pod_of_the_release() -> None:
    """Head, workers and the keys job match its selector; in and out are both closed."""
    manifests = render(example("one-gpu"))
    policy = one(manifests, TEMPLATE)
    check(policy)
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    pods = pod_templates(one(manifests, "rayservice.yaml"))
    pods.append(one(manifests, "keys-job.yaml")["spec"]["template"])
    assert all(wanted <= pod["metadata"]["labels"].items() for pod in pods)
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_rays_own_ports_are_for_its_pods_and_the_operator() -> None:
    """Clients reach the API alone; only the release's pods reach everything."""
    inside, clients, operator, prometheus = one(render(), TEMPLATE)["spec"]["ingress"]
    assert _ports(inside) == []
    assert "namespaceSelector" not in inside["from"][0]
    assert clients["from"] == [{"podSelector": {}}]
    assert _ports(clients) == [8000]
    assert 8265 in _ports(operator)
    assert _ports(prometheus) == [8080, 8000]
    for rule, namespace in ((operator, "kuberay-system"), (prometheus, "monitoring")):
        labels = rule["from"][0]["namespaceSelector"]["matchLabels"]
        assert labels == {"kubernetes.io/metadata.name": namespace}


def test_clients_can_be_named() -> None:
    """Given peers take the place of the whole namespace."""
    policy = one(render(example("eight-gpus")), TEMPLATE)
    check(policy)
    assert policy["spec"]["ingress"][1]["from"] == [
        {"namespaceSelector": {"matchLabels": {"shoal-client": "true"}}}
    ]


def test_pods_may_go_out_only_for_what_they_need() -> None:
    """DNS and each other always; the Kubernetes API, database, Redis and more where used."""
    demo = one(render(example("cpu-demo")), TEMPLATE)["spec"]["egress"]
    assert [_ports(rule) for rule in demo] == [[], [53, 53]]
    full = one(render(example("eight-gpus")), TEMPLATE)["spec"]["egress"]
    assert [_ports(rule) for rule in full[2:]] == [[443, 6443], [5432], [6379], [443]]


def test_it_can_be_left_out() -> None:
    """Where another policy does it."""
    assert TEMPLATE not in render(sets=("networkPolicy.enabled=false",))
