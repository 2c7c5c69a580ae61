"""Checkpoints of a Hub: only data, always one revision, and the cache where there is no network.

The library reads its settings when it is imported, so each load runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from models.errors import PoolError
from models.sources.locate import HubSource, parse_hub_source
from tests.models.engines.stacked.tiny import save_checkpoint
from tests.models.sources.hub_server import FakeHub

REPOSITORY = "school/tiny"
NOT_DATA = {
    "pytorch_model.bin": b"\x80pickle",
    "modeling_tiny.py": b"raise SystemExit('code of a checkpoint ran')",
    "onnx/config.json": b"{}",
    "adapter.pt": b"\x80",
}
LOAD = "import sys; from models.pool import load_pool; print(load_pool(sys.argv[1]).models[0].card)"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(name="files", scope="module")
def checkpoint_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a tiny checkpoint by name."""
    folder = save_checkpoint(tmp_path_factory.mktemp("tiny"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(
    home: Path, endpoint: str, *command: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run Python on `command` with the Hub at `endpoint` and its cache in `home`."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        **settings,
    }
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def write_pool(folder: Path, source: str) -> Path:
    """Write a pool of one model."""
    content = {
        "name": "hub",
        "engines": [{"name": "e", "kind": "stacked"}],
        "models": [{"name": "m", "engine": "e", "checkpoint": source}],
    }
    (folder / "pool.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_pull_takes_data_only(tmp_path: Path, files: dict[str, bytes]) -> None:
    """`shoal pull` brings weights, configurations, tokenizer and templates, and nothing else."""
    more = {"chat_template.jinja": b"{{ messages }}", "additional_chat_templates/rag.jinja": b"x"}
    with FakeHub(REPOSITORY, {**files, **more, **NOT_DATA}).serve() as hub:
        out = tmp_path / "out"
        done = run(
            tmp_path / "home",
            hub.address,
            *("-m", "router.cli", "pull", f"hf:{REPOSITORY}", "--out", str(out)),
        )
    assert done.returncode == 0, done.stderr
    pulled = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert pulled == {*files, *more}
    assert not NOT_DATA.keys() & set(hub.fetched)
    assert (out / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert f"hf:{REPOSITORY}@{hub.commit}" in done.stdout
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == ["out"]


def test_a_pool_keeps_its_revision(tmp_path: Path, files: dict[str, bytes]) -> None:
    """The first load writes the commit beside the pool; later ones ask for it, not for the branch,
    and need no network for what they have."""
    pool = write_pool(tmp_path, f"hf:{REPOSITORY}")
    with FakeHub(REPOSITORY, files).serve() as hub:
        first = run(tmp_path / "home", hub.address, "-c", LOAD, str(pool))
        assert first.returncode == 0, first.stderr
        hub.commit = "b" * 40
        other = run(tmp_path / "other-home", hub.address, "-c", LOAD, str(pool))
        # A replica on a third machine gets the model as the first has read it.
        replica = (
            "import sys; from dataclasses import replace; from pathlib import Path;"
            "from models.pool import found_here, load_pool; m = load_pool(sys.argv[1]).models[0];"
            "gone = replace(m, card=replace(m.card, path=Path('/gone')), tokenizer=Path('/gone'));"
            "assert found_here(gone) == m and m.card.path.is_dir()"
        )
        third = run(tmp_path / "third-home", hub.address, "-c", replica, str(pool))
        assert third.returncode == 0, third.stderr
    assert json.loads((pool / "pool.lock").read_text()) == {f"hf:{REPOSITORY}@main": "a" * 40}
    assert f"hf:{REPOSITORY}@{'a' * 40}" in other.stdout
    offline = run(tmp_path / "home", NOWHERE, "-c", LOAD, str(pool))
    assert f"hf:{REPOSITORY}@{'a' * 40}" in offline.stdout, offline.stderr


def test_a_cache_serves_without_network(tmp_path: Path, files: dict[str, bytes]) -> None:
    """A cache filled elsewhere is enough; without one, the error says what to do."""
    pool = write_pool(tmp_path, f"hf:{REPOSITORY}@v1")
    command = ("-m", "router.cli", "models", "--pool", str(pool))
    refused = run(tmp_path / "home", NOWHERE, *command)
    assert refused.returncode == 2
    assert f"hf:{REPOSITORY}@v1: the Hub cannot be reached" in refused.stderr
    assert "Traceback" not in refused.stderr

    cached = tmp_path / "home" / "hub" / "models--school--tiny"
    snapshot = cached / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text("c" * 40)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    served = run(tmp_path / "home", NOWHERE, "-c", LOAD, str(pool), HF_HUB_OFFLINE="1")
    assert f"hf:{REPOSITORY}@{'c' * 40}" in served.stdout, served.stderr


def test_what_is_not_there_is_named(tmp_path: Path, files: dict[str, bytes]) -> None:
    """A repository that the Hub lacks is the error's subject, in one line."""
    with FakeHub(REPOSITORY, files).serve() as hub:
        done = run(tmp_path / "home", hub.address, "-m", "router.cli", "inspect", "hf:no/such")
    assert done.returncode == 2
    assert "hf:no/such@main" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/name", HubSource(name="org/name", file=None, revision="main")),
        ("hf:org/na.me@v1.0", HubSource(name="org/na.me", file=None, revision="v1.0")),
        ("hf:o/n/q/a.gguf@x", HubSource(name="o/n", file="q/a.gguf", revision="x")),
    ],
)
def test_sources_are_parsed(text: str, expected: HubSource) -> None:
    """Repository, file and revision; `main` where none is named."""
    assert parse_hub_source(text) == expected
    assert parse_hub_source(expected.at(expected.revision)) == expected


@pytest.mark.parametrize("text", ["hf:name", "hf:a/b/c", "hf:a/b@", "hf:a/b/../c.gguf", "hf:"])
def test_other_spellings_are_refused(text: str) -> None:
    """What is no source is told the form of one."""
    with pytest.raises(PoolError, match="is not of the form hf:ORG/NAME"):
        parse_hub_source(text)
