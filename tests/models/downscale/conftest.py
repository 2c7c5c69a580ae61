"""The toy pool that the slow tests look at, built once by the command itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def shoal_downscale(*arguments, **environment):
    """Run the command as a user would, on one thread."""
    return subprocess.run(
        [sys.executable, "-m", "router.cli", "downscale", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def toy_pool(tmp_path_factory):
    """What `shoal downscale --quick` wrote."""
    out = tmp_path_factory.mktemp("downscale") / "toy"
    done = shoal_downscale("--quick", "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr
    return out
