"""`shoal replay` on outcomes and on the ledger of a served experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from policies.outcomes import Outcome, write_outcomes
from router.cli.main import app
from router.ledger.database import Database, open_database
from tests.router.experiments.trial_server import EXPERIMENT, log_coins, serving, write_config

FUSED = {"fused": {"kind": "fixed", "plan": {"answer": {"members": ["cheap", "dear"]}}}}


def replay(config: Path, source: object, *options: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, ["replay", str(config), "--from", str(source), *options])


def test_outcomes_give_every_arm_its_quality_and_cost(tmp_path: Path) -> None:
    """Both arms are estimated from every model's answers; a fused policy is refused with why."""
    config = write_config(tmp_path, experiments={"e": EXPERIMENT}, policies=FUSED)
    rows = [
        Outcome(
            query=f"q{i}",
            scores={"cheap": float(i % 4 == 0), "dear": float(i % 4 != 0)},
            prompt_tokens=10,
            output_tokens={"cheap": 100, "dear": 100},
        )
        for i in range(40)
    ]
    write_outcomes(tmp_path / "outcomes.jsonl", rows)
    found = replay(config, tmp_path / "outcomes.jsonl")
    assert found.exit_code == 0
    small, large = (
        next(line for line in found.stdout.splitlines() if line.startswith(name))
        for name in ("small", "large")
    )
    assert "0.2500" in small
    assert "0.7500" in large
    assert (small.split()[-1], large.split()[-1]) == ("0.1", "1")
    refused = replay(config, tmp_path / "outcomes.jsonl", "--policy", "fused")
    assert refused.exit_code == 1
    assert "fused: refused." in refused.stderr
    assert "unknown" in replay(config, tmp_path / "outcomes.jsonl", "--policy", "x").stderr


def fill(database: Database, number: int) -> None:
    """Log requests of which the dear model answered more to its user's liking (seed 1)."""
    rng = np.random.default_rng(1)
    log_coins(database, number, score=lambda _, new: bool(rng.random() < (0.9 if new else 0.4)))


def test_a_ledger_gives_off_policy_estimates(tmp_path: Path) -> None:
    """From a running experiment's rows, fixed policies are estimated, untried ones refused."""
    settings: dict[str, Any] = {"experiments": {"e": EXPERIMENT}, "policies": FUSED}
    with serving(write_config(tmp_path, **settings)) as trial:
        fill(trial.ledger.database, 200)
        config = trial.config
    found = replay(config, tmp_path / "shoal.db", "--policy", "large", "--policy", "fused")
    assert found.exit_code == 0
    [line] = [line for line in found.stdout.splitlines() if line.startswith("large")]
    assert 0.8 < float(line.split()[1]) < 1.0
    assert "fused: refused. replay: 200 of 200 requests would get a plan" in found.stderr
    assert "there is no ledger" in replay(config, tmp_path / "none.db").stderr


def test_a_ledger_without_text_cannot_judge_a_policy_that_reads(tmp_path: Path) -> None:
    """A router needs the query; a ledger that kept none is refused, and says what to set."""
    reading = {"reading": {"kind": "fused", "answer": {"members": ["cheap", "dear"]}}}
    settings: dict[str, Any] = {"experiments": {"e": EXPERIMENT}, "policies": reading}
    with serving(write_config(tmp_path, **settings)) as trial:
        fill(trial.ledger.database, 40)
        config = trial.config
    refused = replay(config, tmp_path / "shoal.db", "--policy", "reading")
    assert refused.exit_code == 1
    assert "set ledger.keep_text" in refused.stderr


def test_the_ledger_opens_where_the_address_says(tmp_path: Path) -> None:
    """A full database address works like a file's path."""
    config = write_config(tmp_path, experiments={"e": EXPERIMENT})
    address = f"sqlite:///{tmp_path / 'shoal.db'}"
    open_database(address).dispose()
    found = replay(config, address)
    assert "the experiment 'e' never ran here" in found.stderr
    nowhere = replay(config, tmp_path / "other.db")
    assert nowhere.exit_code == 1
    assert "other.db; name it with --from" in nowhere.stderr
