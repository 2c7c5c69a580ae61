"""The rules, by Prometheus' own tool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.ops.queries import RULES, rules

PROMTOOL = shutil.which("promtool")
UNIT_TESTS = Path(__file__).parent / "rules" / "alerts.test.yaml"

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus)"
)


def promtool(*arguments: str) -> str:
    """Run promtool; it must succeed. Return what it says."""
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    """`promtool check rules` finds every rule and no fault, lint included."""
    said = promtool("check", "rules", "--lint-fatal", *map(str, RULES))
    assert f"{sum('alert' in rule for rule in rules())} rules found" in said


@needs_promtool
def test_alerts_ring_when_they_should_and_not_before() -> None:
    """promtool's unit tests: healthy and sick series, and what each must say."""
    assert "SUCCESS" in promtool("test", "rules", str(UNIT_TESTS))


def test_every_alert_has_a_unit_test() -> None:
    """Each one is seen ringing there."""
    cases = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    rung = {
        case["alertname"]
        for test in cases
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert rung == {rule["alert"] for rule in rules() if "alert" in rule}


def test_every_alert_says_what_to_do() -> None:
    """A severity, a summary with what is wrong, and a description with what that means."""
    for rule in rules():
        if "alert" in rule:
            assert rule["alert"].startswith("Shoal")
            assert rule["labels"]["severity"] in {"critical", "warning"}
            assert len(rule["annotations"]["description"]) > 40, rule["alert"]
            assert rule["annotations"]["summary"].endswith("."), rule["alert"]
