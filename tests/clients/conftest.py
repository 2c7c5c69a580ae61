"""Client libraries against one served pool, in an environment of their own: `make test-clients`.

The server runs from the main environment, as `shoal serve --local` has it: the pool that ships, and
beside it one model on a scripted server, `caller`, because none of the shipped models calls tools.
Elsewhere the libraries are not installed and nothing in this folder is collected.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.models.engines.remote.bad_server import (
    BadServer,
    Reply,
    answer,
    called,
    finish,
    in_thread,
)
from tests.server import started

ROOT = Path(__file__).parents[2]
POOL = ROOT / "models/pools/default"
PYTHON = str(ROOT / ".venv/bin/python")

collect_ignore_glob = [] if find_spec("litellm") else ["test_*.py"]
# They would ask the Internet for prices, versions and data sets, and tell it of their use.
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "TOKENIZERS_PARALLELISM": "false",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The libraries warn of their own affairs."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


# What `caller` says: it adds, and when it has the sum, it tells it.
CALL = Reply(
    events=[
        called("add", '{"a": 37, '),
        called(None, '"b": 58}'),
        *finish("tool_calls", prompt_tokens=30, completion_tokens=12),
    ]
)
TELL = answer("It is", " 95.", prompt_tokens=50, completion_tokens=4)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running server. `key` may ask, `spent` has no budget left; `upstream` plays `caller`."""

    url: str
    key: str
    spent: str
    upstream: BadServer


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve the shipped pool and `caller` for all tests of this folder; keys are required."""
    folder = tmp_path_factory.mktemp("served")
    with ExitStack() as stack:
        upstream = stack.enter_context(in_thread(CALL, TELL))
        _write_pool(folder, upstream)
        (folder / "config.yaml").write_text(
            f"pool: {folder}\nledger: {{url: 'sqlite:///{folder}/shoal.db'}}\n"
            "auth: {required: true}\n"
        )
        key = _make_key(folder, "all")
        spent = _make_key(folder, "none", "--cap", "requests_per_minute=0")
        command = ("--local", "--config", "config.yaml")
        server = stack.enter_context(started(folder, *command, python=PYTHON))
        yield Served(url=server.url, key=key, spent=spent, upstream=upstream)


@pytest.fixture
def caller(served: Served) -> Served:
    """The server, its `caller` about to call a tool and then to tell the result."""
    served.upstream.replies[:] = [CALL, TELL]
    served.upstream.requests.clear()
    return served


def _write_pool(folder: Path, upstream: BadServer) -> None:
    import yaml

    for part in POOL.iterdir():
        (folder / part.name).symlink_to(part)
    pool: dict[str, Any] = yaml.safe_load((POOL / "pool.yaml").read_text())
    options = {"base_url": upstream.url, "logprobs": False, "max_retries": 0}
    pool["engines"].append({"name": "far", "kind": "remote", "options": options})
    pool["models"].append({"name": "caller", "engine": "far", "remote": {}})
    pair = {"answer": {"members": ["arithmetic", "code"]}}
    pool["policies"]["pair"] = {"kind": "fixed", "plan": pair}
    (folder / "pool.yaml").unlink()
    (folder / "pool.yaml").write_text(yaml.safe_dump(pool))


def _make_key(folder: Path, name: str, *caps: str) -> str:
    command = [PYTHON, "-m", "router.cli", "keys", "create", "--name", name, *caps]
    command += ["--config", f"{folder}/config.yaml"]
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
