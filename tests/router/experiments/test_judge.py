"""Judges: grades of served answers, in rows of their own, beside what people say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from policies.errors import ExperimentError
from router.cli.main import app
from router.config import load_args
from router.experiments.experiments import read_definitions
from router.ledger.feedback import rated_requests
from tests.router.experiments.test_mirror import rows
from tests.router.experiments.trial_server import EXPERIMENT, serving, write_config

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
        trial.run(trial.service.mirror.close())
        trial.rate(answer["id"], label="95")
        database = trial.ledger.database
        found = {r.row["request_id"]: r for r in rated_requests(database, judge="grader")}
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


def test_the_judge_reads_rubric_question_and_answer(tmp_path: Path) -> None:
    """What it is asked holds all three; one who gives no grade leaves none."""
    scripts = {"cheap": {"answers": ["ninety-five"]}}
    config = write_config(tmp_path, scripts=scripts, shadows={"grader": JUDGE})
    asked = []
    with serving(config) as trial:
        engine = trial.service.engines["one"]
        generate = engine.generate

        def listening(request):  # type: ignore[no-untyped-def]
            asked.append(request)
            return generate(request)

        engine.generate = listening  # type: ignore[method-assign]
        trial.ask("What is 37 + 58?")
        [row] = rows(trial, 1)
    [prompt] = [m["content"] for one in asked if one.members == ("dear",) for m in one.messages]
    assert prompt.startswith("Be kind.")
    assert "What is 37 + 58?" in prompt
    assert "ninety-five" in prompt
    assert row["status"] == 200


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
