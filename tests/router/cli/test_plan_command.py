"""`shoal plan` on the command line."""

import pytest
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base-params", "nan"], "--base-params"),
        (["--base-params", "0"], "--base-params"),
        (["--base-params", "-1"], "--base-params"),
        (["--base-params", "1e400"], "--base-params"),
        (["--devices", "9" * 400], "--devices"),
        (["--pue", "inf"], "--pue"),
        (["--general-loss-limit", "nan"], "--general-loss-limit"),
        (["--budget", "10USD", "--usd-per-device-hour", "inf"], "--usd-per-device-hour"),
        (["--budget", "1.2.3tokens"], "'1.2.3tokens' is not an amount and a unit"),
        (["--budget", "1e400tokens"], "budget: it pays for inf tokens per chunk; allowed are"),
        (["--budget", "1e-20gCO2e"], "tokens per chunk; allowed are 1000 to 1e+18"),
        (["--plot", "nowhere/plan.png"], "--plot: there is no folder nowhere"),
        (["--plot", "plan.txt"], "--plot: plan.txt does not end in .png"),
    ],
)
def test_numbers_and_files_that_cannot_be_are_refused_first(options, said, tmp_path, monkeypatch):
    """Each is named with what is allowed, before an answer, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["--base-params", "8e9", *options])
    assert result.exit_code == 2
    assert said in result.output
    assert "Base of" not in result.output
    assert not list(tmp_path.iterdir())
