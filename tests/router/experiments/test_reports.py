"""From requests to a report: the right winner, the same over HTTP and on the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from policies.experiments.experiment import Arm, Experiment
from router.cli.main import app
from router.experiments.reporting import observation
from router.ledger.feedback import RatedRequest
from router.ledger.writer import row_of
from router.record import MemberTokens
from tests.router.experiments.trial_server import EXPERIMENT, Trial, serving, write_config
from tests.router.ledger.records import record


def simulate(trial: Trial, chances: dict[str, float], *, num_users: int, seed: int) -> None:
    """Users ask twice each and rate what they get; `chances` are the arms' chances of a thumb."""
    rng = np.random.default_rng(seed)
    for user in range(num_users):
        for turn in range(2):
            answer = trial.ask("hi", user=f"u{user}")
            assert answer["shoal"]["arm"] in chances, turn
            up = rng.random() < chances[answer["shoal"]["arm"]]
            assert trial.rate(answer["id"], thumb="up" if up else "down").status_code == 200


def test_the_report_names_the_winner_everywhere_alike(tmp_path: Path) -> None:
    """80 users over HTTP; API, command, JSON and plot agree on the better arm (seed 1)."""
    spec = {**EXPERIMENT, "primary": {"minimum_effect": 0.4}}
    with serving(write_config(tmp_path, experiments={"race": spec})) as trial:
        simulate(trial, {"control": 0.2, "new": 0.95}, num_users=80, seed=1)
        told = trial.http.get("/v1/experiments/race").json()
        listed = trial.http.get("/v1/experiments").json()["data"]
        scraped = trial.http.get("/metrics")
        # A scrape waits for the reports, but not for long.
        end_s = time.monotonic() + 60
        while "shoal_experiment_effect_low{" not in scraped.text:
            assert time.monotonic() < end_s, scraped.text
            scraped = trial.http.get("/metrics")
        plot = tmp_path / "race.png"
        common = ["race", "--config", str(trial.config)]
        shown = CliRunner().invoke(app, ["experiment", "report", *common, "--plot", str(plot)])
        as_json = CliRunner().invoke(app, ["experiment", "report", *common, "--json"])
        names = CliRunner().invoke(app, ["experiment", "list", "--config", str(trial.config)])
    assert (told["verdict"], told["winner"], told["status"]) == ("ship", "new", "running")
    assert told["primary"][0]["low"] > 0
    assert told["secondary"][0]["metric"] == "usd"
    assert listed == [told]
    assert json.loads(as_json.stdout) == told
    assert told["recommendation"] in shown.stdout
    assert "sample ratio: ok" in shown.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "race  [running]" in names.stdout
    assert scraped.headers["content-type"].startswith("text/plain")
    values = {
        (sample.name, sample.labels.get("arm"), sample.labels.get("metric")): sample.value
        for family in text_string_to_metric_families(scraped.text)
        for sample in family.samples
    }
    assert values["shoal_experiment_effect_low", "new", "quality"] == told["primary"][0]["low"]
    assert values["shoal_experiment_units", "new", None] > 0


def test_a_guardrail_stops_the_harmful_arm_while_serving(tmp_path: Path) -> None:
    """The arm that costs ten times as much is stopped; its users get the control's policy.

    A restart remembers it, and the report says why.
    """
    spec = {
        **EXPERIMENT,
        "guardrails": [{"metric": "usd", "limit": 1.0, "relative": True}],
    }
    config = write_config(tmp_path, experiments={"e": spec})
    with serving(config) as trial:
        trial.stop_watching()
        for user in range(80):
            trial.ask("x" * (5 + user % 7), user=f"u{user}")
        trial.flush()
        harmed = next(
            f"u{u}" for u in range(80) if trial.ask(user=f"u{u}")["shoal"]["arm"] == "new"
        )
        experiments = trial.service.experiments
        assert experiments is not None
        trial.run(experiments.check(experiments.definitions[0]))
        after = trial.ask(user=harmed)["shoal"]
        assert after["policy"] == "small"
        assert "arm" not in after
    with serving(config) as trial:
        assert trial.ask(user=harmed)["shoal"]["policy"] == "small"
        told = trial.http.get("/v1/experiments/e").json()
    assert told["verdict"] == "keep_control"
    assert told["stopped"]["new"]["metric"] == "usd"
    assert "usd is worse by at least" in told["notes"][0]
    assert not told["sample_ratio"]["alarm"]


def test_thompson_sampling_moves_the_weights(tmp_path: Path) -> None:
    """With adaptive weights the better arm gets more, and the report warns of what that costs.

    Requests are split at random; fewer than 30 of 100 in an arm has probability 4e-5.
    """
    spec = {
        **EXPERIMENT,
        "unit": "request",
        "allocation": {"kind": "thompson", "floor": 0.1},
    }
    with serving(write_config(tmp_path, experiments={"e": spec})) as trial:
        trial.stop_watching()
        for turn in range(100):
            answer = trial.ask(f"hi {turn}")
            good = answer["shoal"]["arm"] == "new"
            trial.rate(answer["id"], score=0.9 if good and turn % 5 else 0.2)
        trial.flush()
        experiments = trial.service.experiments
        assert experiments is not None
        trial.run(experiments.check(experiments.definitions[0]))
        told = trial.http.get("/v1/experiments/e").json()
    assert told["weights"]["new"] == pytest.approx(0.9, abs=0.02)
    assert any("Thompson" in note for note in told["notes"])


def test_unknown_experiments_are_refused(tmp_path: Path) -> None:
    """404 over HTTP, exit code 1 on the command line, with the names there are."""
    with serving(write_config(tmp_path, experiments={"e": EXPERIMENT})) as trial:
        response = trial.http.get("/v1/experiments/other")
        ran = CliRunner().invoke(
            app, ["experiment", "report", "other", "--config", str(trial.config)]
        )
    assert response.status_code == 404
    assert "configured: e" in response.json()["error"]["message"]
    assert ran.exit_code == 1
    assert "it has e" in ran.stderr


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"error_rate": 0.0, "tokens": 60.0, "predicted_quality": 0.9, "latency_s": 0.25}),
        ({"status": 503}, {"error_rate": 1.0, "latency_s": None, "feedback_rate": None}),
        ({"status": 429}, {"error_rate": 1.0}),
        ({"status": 400}, {"error_rate": None, "usd": 0.001}),
        ({"members": {"code": MemberTokens(prompt_tokens=1)}}, {"predicted_quality": 0.4}),
        (
            {
                "stages": (
                    {"path": "", "combinator": "cascade"},
                    {"path": "0", "outcome": "rejected"},
                    {"path": "1", "outcome": "ok"},
                )
            },
            {"escalation_rate": 1.0},
        ),
        (
            {"stages": ({"path": "", "combinator": "cascade"}, {"path": "0", "outcome": "ok"})},
            {"escalation_rate": 0.0},
        ),
        (
            {
                "stages": (
                    {"path": "", "combinator": "best"},
                    {"path": "0", "outcome": "ok"},
                    {"path": "1", "outcome": "ok"},
                )
            },
            {"escalation_rate": 0.0},
        ),
    ],
)
def test_rows_become_metrics(fields: dict[str, Any], expected: dict[str, float | None]) -> None:
    """What each kind of request counts for."""
    placed = {"experiment": "e", "arm": "a", "unit": "u", "propensity": 0.5}
    row = row_of(record(**placed, **fields))
    arms = tuple(Arm(name=name, policy="auto", weight=0.5) for name in "ab")
    rated = RatedRequest(row=row, score=None, label=None, feedback_s=None)
    seen = observation(rated, Experiment(name="e", arms=arms))
    assert {key: seen.values[key] for key in expected} == expected
