"""`python -m tests.bench.replay` on the command line."""

import json

import typer
from typer.testing import CliRunner

from tests.bench.replay.__main__ import main

app = typer.Typer()
app.command()(main)

POOL = """
name: test
engines: [{name: fake, kind: fake}]
models:
- {name: small, engine: fake, usd_per_million_output_tokens: 1}
- {name: large, engine: fake, usd_per_million_output_tokens: 10}
"""


def test_a_pools_outcomes_are_replayed_against_a_target(tmp_path):
    """The table has the controller beside the optimum and the baselines; the plot is a PNG."""
    (tmp_path / "pool.yaml").write_text(POOL)
    rows = [
        {
            "query": f"{'easy' if n % 2 else 'hard'} question {n}",
            "scores": {"small": n % 2, "large": 1},
            "prompt_tokens": 10,
            "output_tokens": {"small": 20, "large": 20},
        }
        for n in range(80)
    ]
    (tmp_path / "outcomes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plot = tmp_path / "day.png"
    result = CliRunner().invoke(
        app,
        ["--pool", str(tmp_path), "--resource", "usd", "--requests", "200", "--plot", str(plot)],
    )
    assert result.exit_code == 0, result.output
    for name in ("offline optimum", "controller", "fixed price", "greedy", "uniform thinning"):
        assert name in result.output
    assert "usd per hour" in result.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_missing_pool_is_one_sentence_and_a_failure(tmp_path):
    """Status 2 and the path that was looked for."""
    result = CliRunner().invoke(app, ["--pool", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "there is no pool file at" in result.output
