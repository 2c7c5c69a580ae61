"""Engine kinds by name: Shoal's own, and those of other distributions."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.errors import PoolError
from models.pool import load_pool
from tests.router.conftest import running

ENGINE = """
from pydantic import BaseModel, ConfigDict

from models.engines.base import Chunk, EngineStats, Token
from models.engines.kind import EngineKind, EngineTraits


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    word: str
    num_threads: int | None = None


class Parrot:
    def __init__(self, spec, options, models):
        self.members = tuple(model.name for model in models)
        self._word = options.word.format(options.num_threads)

    async def start(self): ...

    async def generate(self, request):
        word = Token(token_id=0, raw=self._word.encode(), logprob=0.0)
        yield Chunk(text=self._word, tokens=(word,), finish_reason="stop")

    def stats(self):
        return EngineStats()

    def check_health(self): ...

    async def stop(self): ...


KIND = EngineKind(
    options=Options, inspect=lambda spec, options, models: EngineTraits(), create=Parrot
)
"""
PARROT = [{"name": "one", "kind": "parrot", "options": {"word": "hello"}}]
MODEL = [{"name": "polly", "engine": "one"}]
POLICIES = {"auto": {"kind": "fixed", "plan": "polly"}}


@pytest.fixture(name="distribution")
def installed_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install a distribution with the engine above, as pip leaves one; yield its entry points."""
    site = tmp_path / "site"
    metadata = site / "shoal_parrot-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "shoal_parrot.py").write_text(ENGINE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shoal-parrot\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[shoal.engines]\nparrot = shoal_parrot:KIND\n")
    monkeypatch.syspath_prepend(site)
    yield metadata / "entry_points.txt"
    sys.modules.pop("shoal_parrot", None)


@pytest.mark.usefixtures("distribution")
def test_another_distribution_brings_an_engine(tmp_path: Path) -> None:
    """It is served by its kind, and its options are checked, without a line in Shoal."""
    with running(tmp_path, engines=PARROT, models=MODEL, policies=POLICIES) as server:
        assert server.chat(model="polly").choices[0].message.content == "hello"
    with (
        pytest.raises(PoolError, match=r"engines\.one\.options: wort: unknown key"),
        running(
            tmp_path,
            engines=[{**PARROT[0], "options": {"word": "hello", "wort": 1}}],
            models=MODEL,
            policies=POLICIES,
        ),
    ):
        pass


@pytest.mark.usefixtures("distribution")
@pytest.mark.parametrize(("own", "told"), [({}, "3"), ({"num_threads": 1}, "1")])
def test_the_configurations_threads_reach_every_kind_that_counts_them(
    tmp_path: Path, own: dict[str, int], told: str
) -> None:
    """An engine whose options name no number of threads has the configuration's."""
    engines = [{**PARROT[0], "options": {"word": "{}", **own}}]
    with running(
        tmp_path, app={"num_threads": 3}, engines=engines, models=MODEL, policies=POLICIES
    ) as server:
        assert server.chat(model="polly").choices[0].message.content == told


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:KIND", "'parrot' .no_such_module:KIND.* cannot be imported: No module"),
        ("shoal_parrot:Parrot", "'parrot' .shoal_parrot:Parrot.* is a type, not a EngineKind"),
    ],
)
def test_a_broken_distribution_is_told_by_name(
    distribution: Path, tmp_path: Path, value: str, message: str
) -> None:
    """What its entry point names must be there and be a kind."""
    distribution.write_text(f"[shoal.engines]\nparrot = {value}\n")
    file = tmp_path / "pool.yaml"
    file.write_text("{name: p, engines: [{name: e, kind: parrot}], models: [{name: m, engine: e}]}")
    with pytest.raises(PoolError, match=rf"engines\.e\.kind: {message}"):
        load_pool(file)


def test_kinds_are_known_without_a_tensor_library() -> None:
    """Whoever reads a pool file asks every kind; only making an engine imports what computes."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from models.engines.registry import KINDS\n"
            "assert [KINDS.load(name) for name in KINDS.names()]\n"
            "print({'torch', 'vllm', 'transformers'} & set(sys.modules))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "set()\n"
