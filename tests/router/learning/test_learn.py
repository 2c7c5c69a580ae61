"""`shoal learn`: from questions to policies of a pool, measured, installed beside the old ones."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from models.pool import load_pool
from policies.base import Query
from policies.outcome_sets import divide
from policies.outcomes import Outcome, read_outcomes, write_outcomes
from policies.plan import Answer
from policies.routing.router import load_router
from router.catalog.catalog import load_catalog
from router.cli.main import app
from router.learning.exam import Exam
from router.learning.learn import LearnSettings, Lesson, learn
from router.learning.report import install
from router.ledger.database import Database, open_database
from router.ledger.feedback import Feedback, add_feedback
from router.record import SHADOW, MemberTokens
from tests.router.conftest import write_pool
from tests.router.ledger.records import keep, record

MODELS = [
    {"name": "sums", "engine": "one", "usd_per_million_output_tokens": 1},
    {"name": "words", "engine": "one", "usd_per_million_output_tokens": 1},
    {"name": "large", "engine": "two", "usd_per_million_output_tokens": 10},
]
NOUNS = ["apple", "river", "stone", "window", "garden", "candle", "button", "ladder"]


def pool_at(folder: Path) -> Path:
    """Write a pool of one model for sums, one for words, and a dear one that knows both."""
    answers = {"sums": {"answers": ["sum"]}, "words": {"answers": ["word"]}}
    engines = [
        {"name": "one", "kind": "fake", "options": {"models": answers}},
        {"name": "two", "kind": "fake", "options": {"answers": ["sum or word"]}},
    ]
    policies = {"auto": {"kind": "fixed", "plan": "large"}}
    return write_pool(folder, engines=engines, models=MODELS, policies=policies)


def questions_at(folder: Path, number: int) -> Path:
    """Write questions of two kinds, each of which one cheap model gets right."""
    lines: list[dict[str, Any]] = []
    for n in range(number):
        noun = NOUNS[n % len(NOUNS)]
        lines.append(
            {"query": f"How much is {n} plus {3 * n + 1}", "reference": "sum", "tags": ["sums"]}
            if n % 2
            else {"query": f"Spell the {noun} of house {n}", "reference": "word", "tags": ["words"]}
        )
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def shoal(*words: object) -> Result:
    """Run a command."""
    return CliRunner().invoke(app, [str(word) for word in words])


@contextmanager
def closing_database(url: str) -> Iterator[Database]:
    """Open a ledger's database, and give its connections back."""
    database = open_database(url)
    yield database
    database.dispose()


def test_a_pool_learns_from_questions_in_one_command(tmp_path: Path) -> None:
    """The learned router tells the kinds apart; it serves beside the old default, with a report."""
    pool = pool_at(tmp_path)
    before = pool.read_text()
    result = shoal(
        "learn", "--pool", pool, "--queries", questions_at(tmp_path, 90), "--grade", "contains",
        "--budget", "8%",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the best single model, scores 100.0%" in result.stdout
    content = yaml.safe_load(pool.read_text())
    assert content["policies"]["auto"] == {"kind": "fixed", "plan": "large"}
    assert set(content["policies"]) == {"auto", "auto-v1", "cascade-v1", "best-of-v1"}
    assert all(line in pool.read_text().splitlines() for line in before.splitlines())
    policy = load_catalog(load_pool(pool)).policies["auto-v1"]
    rows = read_outcomes(tmp_path / "learned" / "outcomes.jsonl")
    for kind in ("sums", "words"):
        asked = [Query(text=row.query, prompt_tokens=20) for row in rows if row.tags == (kind,)]
        decided = [policy.decide(query).plan for query in asked]
        assert decided.count(Answer(members=(kind,))) > len(asked) / 2
        # What it takes for unfamiliar goes to the safe plan, never to the other cheap model.
        assert set(decided) <= {Answer(members=(kind,)), Answer(members=("large",))}
    page = (tmp_path / "learned" / "v1" / "report.html").read_text()
    for told in ("auto-v1", "oracle of each task", "oracle of each question", "random", "large"):
        assert told in page
    # Of either kind there is an example, and who answers such questions.
    _, _, kinds = page.partition("What a question like yours would get")
    kinds, _, _ = kinds.partition("Where the router is wrong")
    for example, model in (("How much is", "sums"), ("Spell the", "words")):
        assert re.search(rf"{example}[^<]*</td>(?:(?!</tr>).)*{model} \(\d+%\)", kinds, re.DOTALL)
    assert (tmp_path / "learned" / "v1" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_collected_is_used_again_under_a_new_version(tmp_path: Path) -> None:
    """A second lesson takes the outcomes as they are, and leaves the first one's policies."""
    pool = pool_at(tmp_path)
    words = ("learn", "--pool", pool, "--budget", "100%")
    assert shoal(*words, "--queries", questions_at(tmp_path, 60)).exit_code == 0
    kept = tmp_path / "learned" / "outcomes.jsonl"
    assert len(read_outcomes(kept)) == 60
    result = shoal(*words, "--outcomes", kept)
    assert result.exit_code == 0, result.output
    # Whatever is collected next, each lesson keeps its own.
    assert shoal(*words, "--queries", questions_at(tmp_path, 2)).exit_code == 2
    assert len(read_outcomes(kept)) == 2
    assert [len(read_outcomes(kept.parent / v / kept.name)) for v in ("v1", "v2")] == [60, 60]
    policies = yaml.safe_load(pool.read_text())["policies"]
    assert {"auto-v1", "auto-v2"} <= set(policies)
    assert policies["auto-v2"]["path"] == "learned/v2/router.npz"


def test_lessons_at_the_same_time_have_a_version_each(tmp_path: Path) -> None:
    """Both began when there was none."""
    pool = pool_at(tmp_path)
    queries = questions_at(tmp_path, 60)
    assert shoal("outcomes", "collect", "--pool", pool, "--queries", queries, "--grade", "contains",
                 "--out", tmp_path / "o.jsonl").exit_code == 0  # fmt: skip
    rows, before = read_outcomes(tmp_path / "o.jsonl"), load_pool(pool)
    with ThreadPoolExecutor(2) as threads:
        lessons = [threads.submit(learn, rows, before, LearnSettings()) for _ in range(2)]
        versions = {lesson.result().version for lesson in lessons}
    assert versions == {1, 2}
    for version in versions:
        assert (tmp_path / "learned" / f"v{version}" / "router.npz").exists()


def test_a_lesson_that_was_interrupted_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next has its version; what was asked stays."""
    pool = pool_at(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    words = ("learn", "--pool", pool, "--queries", questions_at(tmp_path, 60))
    with monkeypatch.context() as patched:
        patched.setattr(Exam, "measure", interrupt)
        assert shoal(*words).exit_code == 130
    assert [file.name for file in (tmp_path / "learned").iterdir() if file.is_dir()] == []
    assert "auto-v1" not in pool.read_text()
    assert shoal(*words).exit_code == 0
    assert "auto-v1" in pool.read_text()


def test_models_that_few_questions_were_put_to_do_not_hinder_the_others(tmp_path: Path) -> None:
    """They are left out with a note, as are those that --models does not name."""
    pool = pool_at(tmp_path)
    file = tmp_path / "outcomes.jsonl"
    lines = [json.loads(line) for line in questions_at(tmp_path, 60).read_text().splitlines()]
    rows = [
        Outcome(
            query=line["query"],
            scores={"sums": line["reference"] == "sum", "words": line["reference"] == "word"}
            | ({"large": 1.0} if n < 3 else {}),
        )
        for n, line in enumerate(lines)
    ]
    write_outcomes(file, rows)
    words = ("learn", "--pool", pool, "--budget", "100%", "--outcomes", file)
    result = shoal(*words)
    assert result.exit_code == 0, result.output
    assert "Note: left out large: 3 questions have its score" in result.stdout
    assert load_router(tmp_path / "learned/v1/router.npz").models == ("sums", "words")
    write_outcomes(file, [replace(row, scores={**row.scores, "large": 1.0}) for row in rows])
    assert shoal(*words, "--models", "sums, large").exit_code == 0
    assert load_router(tmp_path / "learned/v2/router.npz").models == ("sums", "large")
    none = shoal(*words, "--models", "sums,huge")
    assert "--models: 'huge' is unknown; the pool has sums, words, large" in none.stderr
    write_outcomes(file, [replace(row, scores={"others": 1.0}) for row in rows])
    assert "the outcomes score others, and 0 of them are among sums" in shoal(*words).stderr


@pytest.mark.parametrize("empty", ["policies: {}  # none yet", "policies:\n  {}"])
def test_a_pool_without_policies_gets_its_first_ones(tmp_path: Path, empty: str) -> None:
    """Under the key that is there, however it says that there are none; never a second one."""
    pool = pool_at(tmp_path)
    head, _, _ = pool.read_text().partition("policies:")
    pool.write_text(f"{head}{empty}\n# the end\n")
    result = shoal(
        "learn", "--pool", pool, "--queries", questions_at(tmp_path, 60), "--grade", "contains",
        "--budget", "100%",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    after = pool.read_text()
    assert "auto-v1" in yaml.safe_load(after)["policies"]
    assert after.startswith(head) and after.count("policies:") == 1 and "# the end" in after


def test_what_policies_share_is_written_out(tmp_path: Path) -> None:
    """A second lesson stands beside the first, though policies of each have settings in common."""
    pool = pool_at(tmp_path)
    shared = {"kind": "fixed", "plan": "large"}
    for version in (1, 2):
        lesson = Lesson(
            specs={f"auto-v{version}": shared, f"cascade-v{version}": shared},
            measured=(),
            mistakes=(),
            kinds=(),
            curve=(),
            num_train=0,
            best_single="large",
            version=version,
            unfamiliar=0.0,
        )
        install(lesson, pool)
    policies = yaml.safe_load(pool.read_text())["policies"]
    assert policies == dict.fromkeys(
        ("auto", "auto-v1", "cascade-v1", "auto-v2", "cascade-v2"), shared
    )


def test_too_few_questions_say_how_many_more(tmp_path: Path) -> None:
    """Nothing is written into the pool."""
    pool = pool_at(tmp_path)
    before = pool.read_text()
    result = shoal("learn", "--pool", pool, "--queries", questions_at(tmp_path, 12))
    assert result.exit_code == 2
    assert "are too few" in result.stderr and "more" in result.stderr
    assert pool.read_text() == before


def test_a_dry_run_reports_and_installs_nothing(tmp_path: Path) -> None:
    """The pool file stays as it was."""
    pool = pool_at(tmp_path)
    before = pool.read_text()
    result = shoal(
        "learn", "--pool", pool, "--queries", questions_at(tmp_path, 60), "--dry-run",
        "--grade", "contains",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert pool.read_text() == before and "Installed" not in result.stdout


@pytest.mark.parametrize("budget", ["0%", "140%", "half", "40"])
def test_a_budget_that_is_no_share_is_refused(tmp_path: Path, budget: str) -> None:
    """Before anything is asked."""
    result = shoal("learn", "--pool", pool_at(tmp_path), "--budget", budget)
    assert result.exit_code == 2
    assert f"--budget '{budget}' is not a percentage" in result.stderr


def test_a_division_stays_as_it_is_when_questions_join(tmp_path: Path) -> None:
    """By hash: the old questions keep their part; a repeated one is where its original is."""
    pool = pool_at(tmp_path)
    shoal("learn", "--pool", pool, "--queries", questions_at(tmp_path, 60), "--dry-run")
    rows = read_outcomes(tmp_path / "learned" / "outcomes.jsonl")
    first = {row.query: row.split for row in divide(rows[:30])}
    later = {row.query: row.split for row in divide(rows)}
    assert all(later[query] == split for query, split in first.items())
    assert {"train", "test"} == set(later.values())


def test_a_ledger_that_is_not_there_is_named_by_its_option(tmp_path: Path) -> None:
    """By the one of this command."""
    ledger = f"sqlite:///{tmp_path}/none.db"
    result = shoal("learn", "--pool", pool_at(tmp_path), "--from-ledger", ledger)
    assert result.exit_code == 2
    assert "name it with --from-ledger" in result.stderr


def test_a_ledgers_questions_are_asked_and_graded(tmp_path: Path) -> None:
    """Each once, those of users who said what is right; a shadow's and a failed one's are not."""
    pool, ledger = pool_at(tmp_path), f"sqlite:///{tmp_path / 'ledger.db'}"
    lines = [json.loads(line) for line in questions_at(tmp_path, 70).read_text().splitlines()]
    served: dict[str, Any] = {"members": {"large": MemberTokens(output_tokens=3)}}
    with closing_database(ledger) as database:
        rows = [
            record(number, **served, query_text=line["query"]) for number, line in enumerate(lines)
        ]
        rows.append(record(90, **served, query_text=lines[0]["query"]))
        rows.append(record(91, **served, query_text="unseen", endpoint=SHADOW))
        rows.append(record(92, **served, query_text="failed", status=500))
        keep(database, rows)
        for number, line in enumerate(lines):
            told = Feedback(
                request_id=f"req-{number}", time_s=1, score=1.0, label=line["reference"]
            )
            add_feedback(database, told)
    words = ("learn", "--pool", pool, "--from-ledger", ledger, "--budget", "100%")
    result = shoal(*words)
    assert result.exit_code == 2 and "give --grade judge:MODEL" in result.stderr
    result = shoal(*words, "--grade", "contains", "--sample", 65)
    assert result.exit_code == 0, result.output
    asked = read_outcomes(tmp_path / "learned" / "outcomes.jsonl")
    assert len(asked) == 65 and all(set(row.scores) == {"sums", "words", "large"} for row in asked)
    assert {row.query for row in asked} < {line["query"] for line in lines}
    assert "auto-v1" in yaml.safe_load(pool.read_text())["policies"]


def test_from_a_ledger_nothing_worse_than_what_serves_is_installed(tmp_path: Path) -> None:
    """A budget that only pays for wrong answers is reported, and the pool stays as it was."""
    pool = pool_at(tmp_path)
    before = pool.read_text()
    ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
    open_database(ledger).dispose()
    queries = tmp_path / "hard.jsonl"
    queries.write_text(
        "\n".join(
            json.dumps({"query": f"Riddle {n} of {n * n}", "reference": "sum or word"})
            for n in range(70)
        )
    )
    bare = shoal("learn", "--pool", pool, "--from-ledger", ledger)
    assert "no answer that a user scored" in bare.stderr and "--grade judge" in bare.stderr
    words = ("learn", "--pool", pool, "--queries", queries, "--from-ledger", ledger)
    result = shoal(*words, "--budget", "30%")
    assert result.exit_code == 0, result.output
    assert "Not installed: it scores" in result.stdout and "less than the serving" in result.stdout
    assert pool.read_text() == before
    result = shoal(*words, "--budget", "100%")
    assert result.exit_code == 0, result.output
    assert "auto-v2" in yaml.safe_load(pool.read_text())["policies"]
