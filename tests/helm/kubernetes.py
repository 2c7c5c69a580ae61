"""Checks manifests as an API server would, and refuses what it would silently drop."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

_CRD = Path(__file__).parent / "kuberay" / "rayservice-v1.schema.json"
_VERSION = "1.33"


def check(manifest: dict[str, Any]) -> None:
    """Raise if `manifest` is not valid, or has a field that its kind lacks.

    Kinds of the Prometheus operator have no schema here; their tests look at every field.
    """
    if manifest["apiVersion"].startswith("monitoring.coreos.com/"):
        return
    if manifest["kind"] == "RayService":
        _rayservice().validate(manifest)
        for template in pod_templates(manifest):
            # Kubernetes' own schema knows more of pods than the CRD's copy.
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            kubernetes_validate.validate(pod, _VERSION, strict=True)
        return
    kubernetes_validate.validate(manifest, _VERSION, strict=True)


def pod_templates(rayservice: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pod templates of head and workers."""
    cluster = rayservice["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


@cache
def _rayservice() -> jsonschema.Draft7Validator:
    schema = _closed(json.loads(_CRD.read_text()))
    return jsonschema.Draft7Validator(schema)


def _closed(schema: Any) -> Any:
    """Return `schema` with unknown fields refused, where the CRD does not keep them."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    named = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
