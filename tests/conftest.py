"""How `pytest -n 2` shares the cores: by file, and files that start Ray one after another.

A slow machine is no fault of what is tested: property tests have no deadline, and they try the same
examples at every run.
"""

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

with suppress(ImportError):  # vLLM's environment does without
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "patient",
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("patient")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests that are coroutines run on asyncio."""
    return "asyncio"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what hands the tests out to the processes."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", maxsplit=1)[0]
            return "ray" if starts_ray(config.rootpath / file) else file

    return ByFile(config, log)


@cache
def starts_ray(file: Path) -> bool:
    """Whether tests in this file are marked so."""
    return "pytest.mark.ray" in file.read_text()
