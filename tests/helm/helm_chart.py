"""Renders the chart with helm, or with a stand-in that runs the same templates."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "shoal"
EXAMPLES = ("cpu-demo", "one-gpu", "eight-gpus")

_STAND_IN = ROOT.parent / "shared" / "tools" / "helm-template"
# The same as yaml.safe_load, in C where it can be: dashboards are long.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SOURCE = re.compile(r"^# Source: (.*)$", re.MULTILINE)

Manifest = dict[str, Any]


class RenderError(Exception):
    """The chart refused its values."""


def render(
    *files: Path, sets: Sequence[str] = (), release: str = "demo", namespace: str = "shoal"
) -> dict[str, list[Manifest]]:
    """Return the manifests by template, rendered with values `files` and `sets` (a.b=c).

    Raises `RenderError`; skips the test where there is nothing to render with.
    """
    text = _rendered(files, tuple(sets), release, namespace)
    manifests: dict[str, list[Manifest]] = {}
    parts = _SOURCE.split(text)
    for source, body in zip(parts[1::2], parts[2::2], strict=True):
        name = source.rpartition("templates/")[2]
        if name.endswith(".yaml"):
            found = [one for one in yaml.load_all(body, Loader=_LOADER) if one is not None]
            manifests.setdefault(name, []).extend(found)
    return manifests


def one(manifests: dict[str, list[Manifest]], template: str) -> Manifest:
    """Return the only manifest of `template`."""
    [manifest] = manifests[template]
    return manifest


def example(name: str) -> Path:
    """Return the example values called `name`."""
    return CHART / "examples" / f"{name}.yaml"


def notes(*files: Path) -> str:
    """Return what a person reads after installing; skips where `helm template` leaves it out."""
    text = _rendered(files, (), "demo", "shoal")
    if "templates/NOTES.txt" not in text:
        pytest.skip("helm template does not print NOTES.txt")
    parts = _SOURCE.split(text)
    return next(
        body for source, body in zip(parts[1::2], parts[2::2], strict=True) if "NOTES" in source
    )


@cache
def _rendered(files: tuple[Path, ...], sets: tuple[str, ...], release: str, space: str) -> str:
    values = [argument for file in files for argument in ("-f", str(file))]
    values += [argument for pair in sets for argument in ("--set", pair)]
    command = [*_renderer(), "-n", space, *values, release, str(CHART)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RenderError(done.stderr)
    return done.stdout


@cache
def _renderer() -> tuple[str, ...]:
    """Return the command: helm, $HELM_TEMPLATE, or a stand-in that is built if it can be."""
    if helm := shutil.which("helm"):
        return (helm, "template")
    if given := os.environ.get("HELM_TEMPLATE") or shutil.which("helm-template"):
        return (given,)
    script, target = _STAND_IN / "build.sh", Path("/usr/local/bin/helm-template")
    if script.is_file() and os.geteuid() == 0:
        built = subprocess.run(
            ["bash", str(script), str(target)], capture_output=True, text=True, check=False
        )
        if built.returncode == 0:
            return (str(target),)
    pytest.skip("needs helm (or HELM_TEMPLATE, a command that renders charts)")
