"""The Dockerfile: its steps, run without a container engine as far as that goes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helm.dockerfile import copy_context, exec_form, lineage, read_stages
from tests.helm.helm_chart import ROOT
from tests.router.conftest import running

STAGES = read_stages(ROOT / "Dockerfile")
TARGETS = ("cpu", "cuda")


def _last(target: str, keyword: str) -> str:
    return next(steps[-1] for stage in lineage(STAGES, target) if (steps := stage.all(keyword)))


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_somebody_without_rights(target: str) -> None:
    """The user is a number, which Kubernetes can see is not 0, and no stage becomes root."""
    assert _last(target, "USER") == "1000:1000"
    assert all(stage.all("USER") in ([], ["1000:1000"]) for stage in lineage(STAGES, target))


def test_what_it_is_built_on_is_pinned() -> None:
    """Every base is another stage, or an image with a full version."""
    for stage in STAGES.values():
        assert stage.base in STAGES or re.fullmatch(r"python:3\.11\.\d+-slim-\w+", stage.base)


@pytest.mark.parametrize("target", TARGETS)
def test_it_serves_what_people_serve(target: str) -> None:
    """The command is the one of the README, reachable from outside, at the exposed port."""
    assert exec_form(_last(target, "CMD")) == ["shoal", "serve", "--host", "0.0.0.0"]
    assert _last(target, "EXPOSE") == "8000"
    done = subprocess.run(
        [sys.executable, "-m", "router.cli", "serve", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--host" in done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_installed_as_a_person_would(target: str) -> None:
    """Both targets run `make install`, each by its lock, and tell what that was."""
    install, sbom = STAGES[f"build-{target}"].all("RUN")
    assert install.endswith(f"make install LOCKED=1 IMAGE={target}")
    assert sbom.endswith("make sbom")
    told = f"--from=build-{target} /opt/shoal/sbom.json /opt/shoal/sbom.json"
    assert told in STAGES[target].all("COPY")
    rules = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{rule}:", rules, re.MULTILINE) for rule in ("install", "sbom"))


def _as_installed(pin: re.Match[str]) -> str:
    return f"{pin[1]}=={version(pin[1])}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_steps_install_all_that_serving_needs(tmp_path: Path) -> None:
    """What COPY takes is enough: the step's own command installs it, pool and page included.

    Dependencies are those of this environment, so that nothing is downloaded.
    """
    context = tmp_path / "opt" / "shoal"
    context.mkdir(parents=True)
    copy_context(ROOT, STAGES["build"], context)
    lock = context / "locks" / "cpu.txt"
    lock.write_text(re.sub(r"(?m)^([^#\s=]+)==\S+", _as_installed, lock.read_text()))
    step, _ = STAGES["build-cpu"].all("RUN")
    command = step[step.index("make ") :]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PIP_")},
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say: do not isolate
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(
        [*command.split(), f"PYTHON={sys.executable}"],
        cwd=context, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [site] = (context / ".venv" / "lib").glob("python3.*/site-packages")
    for name in (
        "models/pools/default/pool.yaml",
        "models/pools/default/base/model.safetensors",
        "policies/data/grid/zones.csv",
        "router/dashboard/page/index.html",
        "router/dashboard/page/vendor/uPlot.iife.min.js",
        "router/dashboard/page/vendor/LICENSE.uPlot",
    ):
        assert (site / name).is_file(), name
    assert not (site / "tests").exists()
    assert not list(site.glob("__editable__*"))
    path = f"{context / '.venv' / 'bin'}:{os.environ['PATH']}"
    for stage in TARGETS:
        for check in STAGES[stage].all("RUN"):
            subprocess.run(
                ["bash", "-c", check],
                cwd=tmp_path, env={**environment, "PATH": path}, check=True,
            )  # fmt: skip
    told = subprocess.run(
        ["bash", "-c", "shoal --version"],
        cwd=tmp_path, env={**environment, "PATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.startswith("shoal 0.1")


@pytest.mark.skipif(shutil.which("wget") is None, reason="needs wget, as the image has")
def test_its_health_check_tells_health_from_its_absence(tmp_path: Path) -> None:
    """The command succeeds on a server that can serve, and fails on none."""
    words = exec_form(_last("cpu", "HEALTHCHECK"))
    with running(tmp_path) as server:
        here = [word.replace("http://127.0.0.1:8000", server.url) for word in words]
        assert here != words
        assert subprocess.run(here, check=False).returncode == 0
    assert subprocess.run(here, check=False, stderr=subprocess.DEVNULL).returncode != 0


def test_login_shells_find_the_commands() -> None:
    """KubeRay starts Ray in a login shell, which resets PATH: a profile sets it again."""
    [setup] = [step for step in STAGES["base"].all("RUN") if "profile.d" in step]
    assert "export PATH=/opt/shoal/.venv/bin:$PATH" in setup
    assert " wget " in setup, "KubeRay's probes and the chart's ask with it"
