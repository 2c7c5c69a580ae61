"""`shoal learn --from-ledger --config`: what a new router would have scored on logged traffic."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from policies.outcomes import Outcome, write_outcomes
from router.cli.main import app
from tests.router.experiments.trial_server import EXPERIMENT, log_coins, serving, write_config


def sums(number: int) -> str:
    """A question that the dear model knows; the others are the cheap one's."""
    return f"How much is {number} plus {3 * number}" if number % 2 else f"Spell the word {number}"


def test_an_experiments_log_says_what_the_new_router_would_have_scored(tmp_path: Path) -> None:
    """The router tells the kinds apart, which no arm did; what it learned from is left out."""
    with serving(write_config(tmp_path, experiments={"e": EXPERIMENT})) as trial:
        log_coins(
            trial.ledger.database,
            400,
            score=lambda number, new: new == bool(number % 2),
            text=lambda number: sums(1000 + number),
        )
        config = trial.config
    rows = [
        Outcome(query=sums(n), scores={"cheap": float(n % 2 == 0), "dear": float(n % 2)})
        for n in range(80)
    ]
    write_outcomes(tmp_path / "outcomes.jsonl", rows)
    words = [
        "learn",
        "--pool",
        tmp_path,
        "--outcomes",
        tmp_path / "outcomes.jsonl",
        "--budget",
        "100%",
    ]
    words += ["--config", config]
    runner = CliRunner()
    alone = runner.invoke(app, [str(word) for word in words])
    assert alone.exit_code == 2 and "--config: there is no --from-ledger" in alone.stderr
    words += ["--from-ledger", f"sqlite:///{tmp_path / 'shoal.db'}"]
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    told = [line for line in result.stdout.splitlines() if "By the log of the experiment e" in line]
    assert len(told) == 2, told
    serving_policy, learned = (float(line.split("have scored ")[1].split()[0]) for line in told)
    assert serving_policy == pytest.approx(0.5, abs=0.15) and learned > 0.85
