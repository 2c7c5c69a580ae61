"""The experiments and shadows of a configuration, checked against the pool's policies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.pool import Pool, load_pool
from policies.experiments.config import Experiment
from policies.experiments.read import read_experiments
from policies.experiments.shadow import Shadow, read_shadows
from router.catalog.policies import DEFAULT_POLICY
from router.config import AppArgs


def read_definitions(args: AppArgs) -> tuple[tuple[Experiment, ...], tuple[Shadow, ...]]:
    """Return the configured experiments and shadows.

    Raises `ExperimentError`, also for a policy that neither the pool nor the configuration has.
    """
    names = policy_specs(args, load_pool(args.pool))
    return (
        read_experiments(args.experiments, policies=names),
        read_shadows(args.shadows, policies=names),
    )


def policy_specs(args: AppArgs, pool: Pool) -> Mapping[str, Mapping[str, Any]]:
    """Return every policy's specification by name; the default one exists without any."""
    return {DEFAULT_POLICY: {}, **pool.policies, **args.policies}


def policy_contents(args: AppArgs, pool: Pool) -> dict[str, str]:
    """Return a description of each policy that changes when its settings or files change."""
    return {
        name: json.dumps(spec, sort_keys=True, default=str) + _files_sha256(spec, pool.folder)
        for name, spec in policy_specs(args, pool).items()
    }


def _files_sha256(spec: Mapping[str, Any], folder: Path) -> str:
    """Hash the files that `spec` names, and those in the folders that it names."""
    digest = hashlib.sha256()
    for value in spec.values():
        if not isinstance(value, str):
            continue
        path = folder / value
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
