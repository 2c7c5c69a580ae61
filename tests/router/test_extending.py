"""docs/extending.md: its distribution builds, installs and serves, and its walks lead somewhere."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from models.pool import load_pool
from policies.errors import PolicyError
from router.catalog.catalog import load_catalog
from tests.router.conftest import running

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "extending.md").read_text()
# Each block names its file in a comment on its first line.
FILES = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
POOL = yaml.safe_load(FILES["pool.yaml"])


@pytest.fixture(scope="module", name="installed", autouse=True)
def installed_distribution(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Build the document's distribution and install it with pip, without network."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, content in FILES.items():
        file = source / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    (source / "shoal_example" / "__init__.py").touch()
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *offline, "--target", site, source], check=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "shoal_example"]:
        del sys.modules[name]


def test_a_policy_and_an_engine_of_another_distribution_serve(tmp_path: Path) -> None:
    """The policy chooses by length, and the engine that it chooses answers."""
    with running(tmp_path, **POOL) as server:
        assert server.chat("hello there", "auto").choices[0].message.content == "hello there"
        longer = server.chat("hello there, everybody", "auto")
        assert longer.choices[0].message.content == "HELLO THERE, EVERYBODY!"
        [named] = [m for m in server.client.models.list() if m.id == "policy/auto"]
        assert named.model_extra["shoal"]["members"] == ["small", "large"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lang": "large"}, "by-length: the key 'lang' is unknown; allowed are short, long"),
        ({"most_characters": 0}, "by-length.most_characters: 0 is refused: it should be greater"),
        ({"long": "huge"}, "names the model 'huge', which the pool lacks"),
    ],
)
def test_its_settings_are_checked_like_any(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """Keys, values and models of a foreign policy are refused by name when the pool loads."""
    auto = {**POOL["policies"]["auto"], **change}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({**POOL, "policies": {"auto": auto}}))
    with pytest.raises(PolicyError, match=f"policies.auto: .*{message}"):
        load_catalog(load_pool(tmp_path))


@pytest.mark.parametrize("kind", ["by_length", "shout"])
def test_an_extension_is_short(kind: str) -> None:
    """A policy and an engine are each under 60 lines."""
    assert len(FILES[f"shoal_example/{kind}.py"].splitlines()) < 60


def test_the_walks_name_files_that_there_are() -> None:
    """Every path in the document exists."""
    paths = set(re.findall(r"`((?:router|models|policies|docs)/[\w/.]+)`", TEXT))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
