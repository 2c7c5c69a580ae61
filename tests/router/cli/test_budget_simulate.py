"""`shoal budget simulate`: a ledger's traffic under a target."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from policies.footprint import Cost
from router.cli.main import app
from router.ledger.database import open_database
from router.ledger.writer import Ledger
from router.metrics.counting import count_rows
from router.record import MemberTokens
from tests.router.ledger.records import record

POOL = """
name: test
engines: [{name: fake, kind: fake}]
models:
- {name: small, engine: fake, domains: [easy], usd_per_million_output_tokens: 1}
- {name: large, engine: fake, domains: [hard], usd_per_million_output_tokens: 10}
"""
NUM_REQUESTS = 600


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A day of fused answers: half the questions gain much by the dear member, half nothing."""
    (tmp_path / "pool.yaml").write_text(POOL)
    url = f"sqlite:///{tmp_path / 'shoal.db'}"
    ledger = Ledger(open_database(url), count=count_rows, logger=logging.getLogger("test"))
    tokens = MemberTokens(prompt_tokens=0, output_tokens=100)
    costs = {"small": Cost(usd=2e-4), "large": Cost(usd=2e-3)}
    for number in range(NUM_REQUESTS):
        hard = number % 2
        row = record(
            number, time_s=1_800_000_000.0 - 1_800_000_000 % 86400 + 144 * number,
            prompt_tokens=0, output_tokens=100, scores={"small": 0.8 - 0.6 * hard, "large": 0.79},
            plan={"answer": {"members": ["small", "large"]}},
            members={"small": tokens, "large": tokens}, costs=costs, stages=(),
        )  # fmt: skip
        row.cost = Cost(usd=2.2e-3)
        ledger.record(row)
    ledger.stop()
    file = tmp_path / "shoal.yaml"
    file.write_text(yaml.safe_dump({"pool": "pool.yaml", "ledger": {"url": url}}))
    return file


def simulate(config: Path, *more: str) -> str:
    """Run the command, which must succeed."""
    result = CliRunner().invoke(
        app, ["budget", "simulate", str(config), "--since", "2000-01-01", *more]
    )
    assert result.exit_code == 0, result.output
    return result.output


def lines(said: str) -> dict[str, list[str]]:
    """Return the table's lines by domain."""
    table = said.split("\n\n")[1].splitlines()[1:]
    return {line.split()[0]: line.split()[1:] for line in table}


def test_a_loose_target_gives_up_no_quality(config: Path) -> None:
    """With money to spare nobody pays, and nothing costs more than it did."""
    said = simulate(config, "--resource", "usd", "--amount", "1000")
    assert "no domain pays for it" in said
    found = lines(said)
    assert float(found["all"][4]) <= float(found["all"][3]) == pytest.approx(1.32, abs=0.005)
    assert float(found["all"][7]) >= float(found["all"][6])


def test_a_tight_target_takes_from_those_who_lose_least(config: Path) -> None:
    """Easy questions lose the dear member, hard ones keep it, and the sentence says all that."""
    said = simulate(config, "--resource", "usd", "--amount", "0.013")
    found = lines(said)
    assert said.startswith("Under 0.013 usd per hour these 600 requests of 24 hours would have")
    easy, hard, total = (found[name] for name in ("easy", "hard", "all"))
    assert easy[0] == hard[0] == "300"
    # The easy half is as good at a tenth of the price; the hard half gets what the target leaves.
    assert float(easy[4]) == pytest.approx(0.06)
    assert float(easy[7]) >= float(easy[6])
    assert "hard (-0." in said
    assert float(total[4]) == pytest.approx(0.013 * 24, rel=0.1)


def test_a_time_without_requests_says_which_time_that_is(config: Path) -> None:
    """The default looks at a week: whoever has an older ledger learns what to say."""
    said = simulate(config, "--resource", "usd", "--amount", "1", "--since", "2100-01-01")
    assert said.splitlines()[1] == "Only requests from --since 2100-01-01 on were looked at."


def test_all_targets_are_named(config: Path) -> None:
    """A policy's several targets stand in the sentence, whose costs are in the first one's unit."""
    wanted = [{"resource": "usd", "amount": 0.013}, {"resource": "wh", "amount": 5, "per": "hour"}]
    policy = {"kind": "budgeted", "policy": {"kind": "fixed", "plan": "large"}, "targets": wanted}
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**content, "policies": {"auto": policy}}))
    said = simulate(config)
    assert said.startswith("Under 0.013 usd per hour and 5 wh per hour these 600 requests")


def test_a_config_without_a_target_says_what_is_missing(config: Path) -> None:
    """One sentence and status 2."""
    result = CliRunner().invoke(app, ["budget", "simulate", str(config)])
    assert result.exit_code == 2
    assert "--resource and --amount" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resource", "usd"], "--resource and --amount go together"),
        (["--amount", "3"], "--resource and --amount go together"),
        (["--resource", "usd", "--amount", "0"], "targets.0.amount: Input should be greater than"),
        (["--resource", "usd", "--amount", "inf"], "targets.0.amount: Input should be a finite"),
        (["--policy", "nobody"], "'nobody' is no budgeted policy"),
    ],
)
def test_a_target_that_is_none_is_refused(config: Path, options: list[str], words: str) -> None:
    """Half a target too: another one would be simulated in its place."""
    result = CliRunner().invoke(app, ["budget", "simulate", str(config), *options])
    assert result.exit_code == 2
    assert words in result.output
