"""`router.app:build` as Ray Serve's own tools use it."""

from pathlib import Path
from typing import Any

import pytest

from models.errors import PoolError
from policies.errors import PolicyError
from tests.router.conftest import write_pool

# Ray Serve's own modules use a deprecated feature of pydantic when they are first imported.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning"),
]


def _build(folder: Path, **arguments: Any) -> Any:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from router.app import build

    return call_user_app_builder_with_args_if_necessary(build, {"pool": str(folder), **arguments})


def test_builds_from_untyped_arguments(tmp_path: Path) -> None:
    """What `serve run` passes as text, and a config file as data, becomes an application."""
    write_pool(tmp_path)
    from ray.serve import Application

    assert isinstance(_build(tmp_path), Application)
    assert isinstance(_build(tmp_path, limits={"max_body_bytes": 100}), Application)


def test_refuses_what_cannot_be_served(tmp_path: Path) -> None:
    """Unknown arguments, missing pools and wrong policies are found before anything starts."""
    write_pool(tmp_path)
    with pytest.raises(ValueError, match="polcies"):
        _build(tmp_path, polcies={})
    with pytest.raises(PoolError, match="there is no pool file"):
        _build(tmp_path / "nowhere")
    with pytest.raises(PolicyError, match="'nobody'"):
        _build(tmp_path, policies={"mine": {"kind": "fixed", "plan": "nobody"}})


def test_serve_config_is_valid(tmp_path: Path) -> None:
    """A file for `serve deploy` names the builder and its arguments; Ray's schema takes it."""
    from ray.serve.schema import ServeDeploySchema

    write_pool(tmp_path)
    arguments = {"pool": str(tmp_path), "limits": {"request_timeout_s": 30}}
    config = {
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": "shoal",
                "route_prefix": "/",
                "import_path": "router.app:build",
                "args": arguments,
            }
        ],
    }
    [application] = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "router.app:build"
    assert _build(tmp_path, **{k: v for k, v in application.args.items() if k != "pool"})
