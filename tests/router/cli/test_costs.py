"""`shoal costs`, `shoal calibrate energy` and `shoal report --unit joules` on a ledger."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import linregress
from typer.testing import CliRunner

from models.pool import DEFAULT_POOL, load_pool
from policies.footprint import Cost
from router.cli.calibrate import calibration
from router.cli.main import app
from router.ledger.database import open_database
from router.ledger.writer import Ledger
from router.metrics.counting import count_rows
from router.record import MemberTokens
from tests.router.ledger.records import record

MEMBER = load_pool(DEFAULT_POOL).models[0].name
COST = Cost(usd=5e-6, wh=0.01, wh_low=0.008, wh_high=0.02, busy_s=2.0, idle_wh=0.004,
            method="measured:rapl", price="typed")  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    """A ledger of ten measured answers of one member, a hundred seconds apart."""
    url = f"sqlite:///{tmp_path / 'shoal.db'}"
    writer = Ledger(open_database(url), count=count_rows, logger=logging.getLogger("test"))
    for number in range(10):
        row = record(
            number, time_s=1_800_000_000.0 + 100 * number, latency_s=100.0, output_tokens=20,
            members={MEMBER: MemberTokens(prompt_tokens=30, output_tokens=20)},
            costs={MEMBER: COST},
        )  # fmt: skip
        row.cost = COST
        writer.record(row)
    writer.stop()
    return url


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose prices follow from the hardware."""
    file = tmp_path / "shoal.yaml"
    economics = {"device_usd": 3153.6, "lifetime_years": 1, "utilisation": 0.5,
                 "usd_per_kwh": 0.5}  # fmt: skip
    file.write_text(yaml.safe_dump({"economics": economics}))
    return file


def run(*arguments: str) -> str:
    """Run a command that must succeed; return what it prints."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_costs_follow_from_seconds_and_energy(ledger: str, config: Path) -> None:
    """The device costs 0.0001 USD a second: 20 busy ones, as many idle, and 0.1 Wh."""
    said = run("costs", "--ledger", ledger, "--config", str(config),
               "--hosted-input", "10", "--hosted-output", "10")  # fmt: skip
    idle_energy = 20 * 0.64 / 3600 * 0.0005
    usd = 20 * 1e-4 * 2 + 0.1 * 0.0005 + idle_energy
    [line] = [line for line in said.splitlines() if line.startswith(MEMBER)]
    assert f"{usd / 500 * 1e6:.4g}" in line
    assert "hardware" in line
    # 0.1 Wh over 500 tokens, at least 0.08 and at most 0.2.
    assert line.split()[-4:] == ["0.72", "0.576", "1.44", "measured:rapl"]
    assert "busy 2.00% of the time" in said
    # A hosted service asks 0.005 USD for the 500 tokens; the device alone costs 0.002.
    even = (1e-4 + 0.64 / 3600 * 5e-4) / (0.005 / 20 - 0.1 / 20 * 5e-4 + 0.64 / 3600 * 5e-4)
    assert f"{even:.1%} of the device's time" in said


def test_engines_on_alike_devices_are_told_together_too(tmp_path: Path, config: Path) -> None:
    """They may share one machine, whose load is then the sum of theirs."""
    url = f"sqlite:///{tmp_path / 'two.db'}"
    writer = Ledger(open_database(url), count=count_rows, logger=logging.getLogger("test"))
    for number, member in enumerate((MEMBER, "base")):
        used = {member: MemberTokens(prompt_tokens=30, output_tokens=20)}
        at = {"time_s": 1_800_000_000.0, "latency_s": 100.0}
        writer.record(record(number, **at, members=used, costs={member: COST}))
    writer.stop()
    said = run("costs", "--ledger", url, "--config", str(config)).splitlines()
    shares = {
        line.split(":")[0]: line.split("busy ")[1].split()[0]
        for line in said
        if "%) " in line or ("busy " in line and ":" in line)
    }
    assert shares == {"chunks": "2.00%", "base": "2.00%", "chunks, base": "4.00%"}


def test_a_ledger_without_answers_has_no_costs(tmp_path: Path, config: Path) -> None:
    """Nothing was asked yet: a sentence, no table of a head alone."""
    url = f"sqlite:///{tmp_path / 'new.db'}"
    open_database(url).dispose()
    hosted = ("--hosted-input", "1", "--hosted-output", "1")
    said = run("costs", "--ledger", url, "--config", str(config), *hosted)
    assert said == "No member of the pool answered anything in this ledger and period.\n"


def test_one_answer_is_costed(tmp_path: Path, config: Path) -> None:
    """A ledger of one request, whose device was as busy as time passed."""
    url = f"sqlite:///{tmp_path / 'one.db'}"
    writer = Ledger(open_database(url), count=count_rows, logger=logging.getLogger("test"))
    used = {MEMBER: MemberTokens(prompt_tokens=30, output_tokens=20)}
    writer.record(record(0, latency_s=0.0, members=used, costs={MEMBER: COST}))
    writer.stop()
    said = run("costs", "--ledger", url, "--config", str(config))
    assert "busy 100.00% of the time" in said


def test_without_economics_prices_are_those_that_were_typed(ledger: str) -> None:
    """The table shows the ledger's own money, and says what would make it follow from hardware."""
    said = run("costs", "--ledger", ledger)
    [line] = [line for line in said.splitlines() if line.startswith(MEMBER)]
    assert f"{10 * 5e-6 / 500 * 1e6:.4g}" in line
    assert "typed" in line
    assert "economics" in said


def test_what_is_known_in_several_ways_names_each_once(tmp_path: Path) -> None:
    """One answer measured, one modelled, one in part each: two methods."""
    url = f"sqlite:///{tmp_path / 'shoal.db'}"
    writer = Ledger(open_database(url), count=count_rows, logger=logging.getLogger("test"))
    both = "measured:rapl+modelled:llmcarbon"
    for number, method in enumerate(("measured:rapl", "modelled:llmcarbon", both)):
        cost = replace(COST, method=method)
        used = {MEMBER: MemberTokens(prompt_tokens=30, output_tokens=20)}
        writer.record(record(number, members=used, costs={MEMBER: cost}))
    writer.stop()
    [line] = [one for one in run("costs", "--ledger", url).splitlines() if one.startswith(MEMBER)]
    assert line.endswith(f" {both}")


def test_a_report_in_joules_tells_their_range(ledger: str) -> None:
    """Joules, between which figures they lie, the idle ones, and per output token."""
    said = run("report", "--by", "method", "--unit", "joules", "--ledger", ledger)
    [line] = [line for line in said.splitlines() if line.startswith("measured:rapl")]
    assert line.split()[-5:] == ["360", "288", "720", "144", "1.8"]


def test_llmcarbon_is_compared_with_what_was_measured(ledger: str) -> None:
    """One command prints both, and their ratio; where there is no counter it says so."""
    said = run("calibrate", "energy", "--seconds", "0.1", "--ledger", ledger)
    assert said.startswith("RAPL: ") or "a CPU's energy is modelled:cpu-time" in said
    [line] = [line for line in said.splitlines() if line.startswith(MEMBER)]
    parameters = load_pool(DEFAULT_POOL).facts()[MEMBER].parameters
    assert parameters is not None
    joules = 2 * parameters / (0.07e12 * 0.3) * 3.97
    assert line.split()[-3:] == [
        f"{0.1 * 3600 / 500:.4g}", f"{joules:.4g}", f"{0.1 * 3600 / 500 / joules:.3g}",
    ]  # fmt: skip


def test_calibration_is_the_line_of_least_squares() -> None:
    """Idle and busy watts are those of scipy's regression, per vCPU (seed 5)."""
    rng = np.random.default_rng(5)
    points = [(busy, 20 + 4.5 * busy + float(rng.normal(0, 0.5))) for busy in (0, 4, 8)]
    line = linregress([busy for busy, _ in points], [watts for _, watts in points])
    said = calibration(points)
    assert f"idle_w: {line.intercept / 8:.3f}" in said
    assert f"power_w: {line.intercept / 8 + line.slope:.3f}" in said


@pytest.mark.parametrize("value", ["nan", "-1", "1e10"])
def test_a_hosted_price_is_a_number_that_may_be(ledger: str, value: str) -> None:
    """What is none would pass every comparison, and be printed as a price."""
    prices = ["--hosted-input", value, "--hosted-output", "1"]
    result = CliRunner().invoke(app, ["costs", "--ledger", ledger, *prices])
    assert result.exit_code == 2
    assert "--hosted-input" in result.output


@pytest.mark.parametrize("option", ["--hosted-input", "--hosted-output"])
def test_half_a_hosted_price_is_refused(ledger: str, option: str) -> None:
    """A break-even that was asked for is never left out without a word."""
    result = CliRunner().invoke(app, ["costs", "--ledger", ledger, option, "1"])
    assert result.exit_code == 1
    assert "--hosted-input and --hosted-output go together" in result.output
