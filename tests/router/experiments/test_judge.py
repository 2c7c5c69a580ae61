"""Judges: grades of served answers, in rows of their own, beside what people say of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from policies.errors import ExperimentError
from router.cli.main import app
from router.config import load_args
from router.experiments.experiments import read_definitions
from router.ledger.feedback import RatedRequest, rated_requests
from tests.router.experiments.test_mirror import rows
from tests.router.experiments.trial_server import EXPERIMENT, Trial, serving, write_config

JUDGE = {"judge": "dear", "share": 1.0, "usd_per_day": 1.0, "concurrency": 4, "rubric": "Be kind."}
SPEC = {
    **EXPERIMENT,
    "judge": "grader",
    "arms": {
        "control": {"policy": "small", "weight": 0.5},
        "new": {"policy": "auto", "weight": 0.5},
    },
    "secondary": ["judged_quality", "grade"],
    "segments": ["language"],
}


def answers(trial: Trial, *, num_grades: int) -> dict[str, RatedRequest]:
    """What was served, by id, once there are so many grades."""
    end_s = time.monotonic() + 60
    while True:
        found = [r for r in rated_requests(trial.ledger.database, judge="grader")
                 if r.row["endpoint"] != "shadow"]  # fmt: skip
        if sum(one.grade is not None for one in found) >= num_grades:
            return {one.row["request_id"]: one for one in found}
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.02)


def test_a_judge_grades_what_was_served_and_people_have_the_last_word(tmp_path: Path) -> None:
    """Its grade stands beside the user's and is not replaced by a label; its cost is its own."""
    scripts = {"cheap": {"answers": ["94"]}, "dear": {"answers": ["A fair 7, I would say."]}}
    config = write_config(
        tmp_path, scripts=scripts, shadows={"grader": JUDGE}, experiments={"e": SPEC}
    )
    with serving(config) as trial:
        answer = trial.ask("Wie viel ist 37 plus 58, bitte?", user="u")
        other = trial.ask("How much is 37 plus 58, please?", user="v")
        graded = rows(trial, 2)
        trial.rate(answer["id"], label="95")
        found = answers(trial, num_grades=2)
        told = trial.http.get("/v1/experiments/e").json()
        [shadow] = trial.http.get("/v1/shadows").json()["data"]
        refused = trial.rate(graded[0]["request_id"], thumb="up")
        shown = CliRunner().invoke(app, ["experiment", "report", "e", "--config", str(config)])
    served = found[answer["id"]]
    assert (served.score, served.grade) == (0.0, pytest.approx(6 / 9))
    assert (found[other["id"]].score, found[other["id"]].grade) == (None, pytest.approx(6 / 9))
    assert served.row["language"] == "de"
    assert found[other["id"]].row["language"] == "en"
    for row in graded:
        assert (row["answered_by"], row["policy"], row["key_id"], row["arm"]) == (
            "dear",
            *[None] * 3,
        )
        assert row["usd"] > 0
    assert list(answer["shoal"]["tokens"]) == ["cheap"]
    assert told["judging_usd"] == pytest.approx(sum(row["usd"] for row in graded))
    assert {arm["means"]["grade"]["mean"] for arm in told["arms"] if arm["means"]} == {6 / 9}
    assert (shadow["judge"], shadow["policy"], shadow["agreement"]) == ("dear", None, None)
    assert (shadow["quality"], shadow["served_quality"]) == (pytest.approx(6 / 9), 0.0)
    assert "judge: grader graded 2 answers for" in shown.stdout
    assert refused.status_code == 404


@pytest.mark.parametrize(
    ("rubric", "question", "answer", "said", "grade"),
    [
        ("Always 4.", "How many?", "nine", (), 4),
        ("Be kind.", "How many are 3?", "nine", (), 3),
        ("Be kind.", "How many?", "9 of them", (), 9),
        ("Be kind.", "How many?", "nine", ("Hard to say.",), None),
    ],
)
def test_the_judge_reads_rubric_question_and_answer(
    tmp_path: Path, rubric: str, question: str, answer: str, said: tuple[str, ...], grade: int
) -> None:
    """A judge who says what he reads gives the first number in it; one without any, no grade."""
    scripts = {"cheap": {"answers": [answer]}, "dear": {"answers": said}}
    shadow = {**JUDGE, "rubric": rubric}
    with serving(write_config(tmp_path, scripts=scripts, shadows={"grader": shadow})) as trial:
        trial.ask(question)
        [row] = rows(trial, 1)
        [found] = answers(trial, num_grades=grade is not None).values()
    assert found.grade == (None if grade is None else pytest.approx((grade - 1) / 9))
    assert (row["status"], row["error"]) == (200, "no_grade" if grade is None else None)


@pytest.mark.parametrize(
    ("shadow", "message"),
    [
        (
            {**JUDGE, "judge": "nobody"},
            r"shadows\.grader\.judge: 'nobody' is unknown; .* cheap, dear",
        ),
        ({**JUDGE, "policy": "large"}, r"shadows\.grader: give a policy .* or a judge"),
        ({"policy": "large", "share": 1.0, "usd_per_day": 1.0}, r"e\.judge: 'grader' is no shadow"),
    ],
)
def test_who_cannot_judge_is_refused(
    tmp_path: Path, shadow: dict[str, object], message: str
) -> None:
    """The key is named, and what is allowed."""
    config = write_config(tmp_path, shadows={"grader": shadow}, experiments={"e": SPEC})
    with pytest.raises(ExperimentError, match=message):
        read_definitions(load_args(config))
