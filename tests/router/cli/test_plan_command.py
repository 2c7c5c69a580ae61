"""`shoal plan` on the command line."""

import typer
from typer.testing import CliRunner

from router.cli.plan import plan

app = typer.Typer()
app.command("plan")(plan)


def test_the_papers_example_is_printed_and_drawn(tmp_path):
    """An 8e9 base wins from n = 7; the table names its constants' origin; the plot is a PNG."""
    file = tmp_path / "plan.png"
    result = CliRunner().invoke(
        app, ["--base-params", "8e9", "--budget", "2tCO2e", "--zone", "DE", "--plot", str(file)]
    )
    assert result.exit_code == 0
    assert "from n = 7 chunks of 1.14B" in result.output
    assert "Germany" in result.output
    assert "Bian et al. 2025" in result.output
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_mistake_is_one_sentence_and_a_failure():
    """An unknown unit ends with status 2 and says what is allowed, without a traceback."""
    result = CliRunner().invoke(app, ["--base-params", "8e9", "--budget", "3 parsecs"])
    assert result.exit_code == 2
    assert "allowed units are tokens" in result.output
    assert "Traceback" not in result.output
