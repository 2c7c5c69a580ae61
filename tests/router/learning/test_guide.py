"""docs/learn.md does what it says: its files are written, its commands run, in order."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from router.cli.main import app

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "learn.md"


def test_every_command_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a pool and a file of questions to two versions of learned policies."""
    blocks = re.findall(r"```(yaml|python|bash)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    said = []
    for language, text in blocks:
        if language == "bash":
            for line in text.strip().splitlines():
                shoal, *words = shlex.split(line)
                assert shoal == "shoal"
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, f"{line}\n{result.output}"
                said.append(result.output)
        else:
            name = text.splitlines()[0].removeprefix("# ")
            Path(name).write_text(text)
            if language == "python":
                runpy.run_path(name)
    assert len(said) == 10
    assert "the best single model, scores 100.0%" in said[0]
    policies = yaml.safe_load(Path("pool.yaml").read_text())["policies"]
    assert {"auto-v1", "cascade-v1", "best-of-v1", "auto-v2", "cascade-v2"} <= set(policies)
