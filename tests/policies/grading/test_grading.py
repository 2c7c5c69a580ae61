"""Graders by name: what each scores, what it refuses, and how several are weighed."""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from policies.errors import PolicyError
from policies.grading.base import GradingContext, Panel, Question, Sheet
from tests.tiny_bert import save_bert


def graded(
    spec: str | list[str], question: Question, context: GradingContext | None = None, **answers: str
) -> Sheet:
    """Return what the graders say of the models' answers."""
    panel = Panel([spec] if isinstance(spec, str) else spec, context or GradingContext())
    return asyncio.run(panel.grade(question, answers))


@pytest.mark.parametrize(
    ("spec", "references", "answer", "score"),
    [
        ("exact", ("Paris",), " paris. ", 1),
        ("exact", ("Paris", "Lutetia"), "Lutetia", 1),
        ("exact", ("Paris",), "It is Paris", 0),
        ("contains", ("Paris",), "It is PARIS, of course", 1),
        ("contains", ("art",), "a party", 0),
        ("contains", ("5",), "It is 5.", 1),
        ("contains", ("5",), "15, or 2.5", 0),
        ("contains", ("5",), "It is -5", 0),
        ("contains", ("-5",), "It is -5", 1),
        ("contains", ("5",), "2-5 years", 1),
        ("contains", ("C++",), "I like C++.", 1),
        ("contains", ("東京",), "首都は東京です", 1),
        ("contains", ("5",), "答えは5です", 1),
        ("contains", ("5",), "答えは15です", 0),
        ("contains", ("서울",), "서울입니다", 1),
        ("contains", ("!",), "wow!", 1),
        ("exact", ("!",), "!", 1),
        ("exact", ("!",), "", 0),
        ("exact", ("北京",), "北京。", 1),
        ("exact", ("Paris",), "“Paris”", 1),
        ("exact", ("नमस्ते",), "नमस्ते।", 1),
        ("regex:^\\d+$", (), "42", 1),
        ("regex:^\\d+$", (), "42!", 0),
        ("regex", ("[Yy]es",), "Well, yes", 1),
        ("numeric", ("1234",), "That makes 1,234.0", 1),
        ("numeric", ("1234",), "1234 or 1235", 0),
        ("numeric:0.01", ("100",), "about 100.9", 1),
        ("numeric:0.01", ("100",), "about 102", 0),
        ("numeric", ("5 km",), "5000 m", 1),
        ("numeric", ("5 km",), "5000", 0),
        ("numeric", ("5 km",), "5 kg", 0),
        ("numeric", ("-3",), "minus three", 0),
        ("numeric", ("2015",), "from 2010-2015", 1),
        ("numeric", ("-3",), "x = -3", 1),
        ("numeric", ("0.5",), "50%", 0),
        ("numeric", ("3/4",), "It is 1/4", 0),
        ("numeric", ("3/4",), "It is 0.75", 1),
        ("numeric", ("-0.75",), r"That makes -\frac{3}{4}.", 1),
        ("numeric", ("1.75",), "It takes 1 3/4 cups", 1),
        ("numeric", ("-2.5",), r"x = -2\dfrac{1}{2}", 1),
        ("numeric", ("2½ h",), "150 min", 1),
        ("numeric", ("1.25",), "7 5/4", 1),
        ("numeric", ("2024",), "on 12/05/2024", 1),
        ("numeric", ("2024",), "by 3 1/4/2024", 1),
        ("numeric", ("1/2",), "0.5/1.0", 1),
        ("numeric", ("1" * 30,), "9" * 400, 0),
        *(("numeric", ("1000",), told, 1) for told in ("1\u202f000", "1\u00a0000", "1'000", "1e3")),
        ("numeric", ("7",), "5'3 7", 1),
        ("numeric", ("-5",), "It is –5 degrees", 1),
        ("numeric", ("6.02e23",), "6.02 × 10^23", 1),
        ("numeric", ("6.02e23",), "6.02×10²³", 1),
        ("numeric", ("1.5e-7",), r"1.5 \times 10^{-7}", 1),
        ("numeric", ("1.5e-7",), "1.5*10⁻⁷ m", 1),
        ("numeric", ("1500000",), "about 1.5 million people", 1),
        ("numeric", ("5 km",), "5 miles", 0),
        ("numeric", ("5 km",), "5,000 metres", 1),
        ("numeric", ("5 min",), "5 hours", 0),
        ("json", ('{"a": [1, 2]}',), '```json\n{"a": [1, 2]}\n```', 1),
        ("json", ("[1]",), "So:\n```JSON\n[1]\n```", 1),
        ("json", ("[1]",), "```json\n[1]", 1),
        ("json", ('["```a```"]',), '["```a```"]', 1),
        ("json", ('{"a": [1, 2]}',), '{"a": [2, 1]}', 0),
        ("json", ('{"a": 1}',), "a is 1", 0),
        ("json", ("[1, 2.0]",), "[1.0, 2]", 1),
        ("json", ("[[1]]",), "[[true]]", 0),
        ("json", ("[1]",), "[" * 100_000, 0),
    ],
)
def test_an_answer_is_compared_with_the_references(
    spec: str, references: tuple[str, ...], answer: str, score: float
) -> None:
    """Each text grader says right or wrong by its own rule."""
    question = Question(query="?", references=references)
    assert graded(spec, question, ada=answer).scores == {"ada": score}


def test_a_pattern_that_never_ends_gives_no_score() -> None:
    """The time of this one doubles with every character; whoever reads the reason can mend it."""
    spec = "regex:(a|aa)+$"
    sheet = graded(spec, Question(query="?"), ada="a" * 60 + "b")
    assert not sheet.scores and "['(a|aa)+$'] took over 1 s" in sheet.problems[spec]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B. Rome", 1),
        ("rome", 1),
        ("The answer is B.", 1),
        ("It must be Rome, I think", 1),
        ("A", 0),
        ("Paris or Rome", 0),
        ("**B**", 1),
        ("\\boxed{B}", 1),
        ("B, because A is wrong", 1),
        ("A) Paris is wrong. The answer is (B)", 1),
        ("A city in Italy: Rome", 1),
        ("I think B", 1),
        ("(b)", 1),
        ("the answer is b.", 1),
        ("My choice: **b**", 1),
        ("The answer is a city", 0),
        ("Certainly. By NASA", 0),
        ("B or C", 0),
        ("no idea", 0),
    ],
)
def test_a_choice_is_named_by_letter_or_by_text(answer: str, score: float) -> None:
    """The reference may be a letter too; an answer that names two texts names none."""
    for right in ("B", "Rome"):
        question = Question(query="?", references=(right,), choices=("Paris", "Rome", "Oslo"))
        assert graded("choice", question, ada=answer).scores == {"ada": score}, right


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("It is Paris, Texas.", 1),
        ("It is Paris.", 0),
        ("Paris, not Paris, Texas", 0),
    ],
)
def test_a_choice_may_stand_within_another(answer: str, score: float) -> None:
    """Who names the longer one has not named the shorter one, unless that stands there, too."""
    question = Question(query="?", references=("B",), choices=("Paris", "Paris, Texas"))
    assert graded("choice", question, ada=answer).scores == {"ada": score}


def test_a_schema_holds_json_without_a_reference() -> None:
    """Answers that the schema refuses score 0."""
    question = Question(query="?", schema={"type": "object", "required": ["name"]})
    sheet = graded("json", question, ada='{"name": 1}', bob="{}", cy="[")
    assert sheet.scores == {"ada": 1, "bob": 0, "cy": 0}


@pytest.mark.parametrize(
    ("spec", "question"),
    [
        ("exact", Question(query="?", references=(" ",))),
        ("contains", Question(query="?", references=("",))),
        ("json", Question(query="?", schema={"type": "foo"})),
        ("json", Question(query="?", schema={"$ref": "http://nowhere.invalid/schema"})),
        ("json", Question(query="?", references=("[" * 100_000,))),
        ("choice", Question(query="?", references=("C",), choices=("yes", "no"))),
    ],
)
def test_a_question_that_cannot_be_graded_is_a_problem_and_not_the_end(
    spec: str, question: Question
) -> None:
    """Empty references, schemas that are none, letters beyond the choices."""
    sheet = graded(spec, question, ada="1")
    assert sheet.scores == {} and sheet.problems[spec]


def test_a_graders_own_fault_is_a_problem_of_the_question() -> None:
    """Another grader's score stands, and the error is named by its type."""

    async def broken(_: str, prompt: str, words: Sequence[str]) -> str:
        raise KeyError("choices")

    question = Question(query="?", references=("a",))
    sheet = graded(["exact", "judge:j"], question, GradingContext(ask=broken), ada="a")
    assert sheet.scores == {"ada": 1}
    assert sheet.problems == {"judge:j": "KeyError: 'choices'"}


def test_code_runs_apart_and_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right code passes; wrong, greedy and early-ending code do not; no environment is seen."""
    monkeypatch.setenv("SECRET", "of this process")
    tests = "assert double(4) == 8\nimport os\nassert 'SECRET' not in os.environ"
    question = Question(query="?", tests=tests)
    with pytest.raises(PolicyError, match="--allow-code"):
        graded("code", question, ada="")
    sheet = graded(
        "code",
        question,
        GradingContext(allow_code=True),
        right="So:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.",
        unclosed="```Python3\ndef double(x): return 2 * x",
        wrong="def double(x): return x",
        leaves="import os\nos._exit(0)",
        greedy="x = bytearray(2 << 30)\ndef double(x): return 2 * x",
    )
    passed = {"right": 1, "unclosed": 1}
    assert sheet.scores == passed | {"wrong": 0, "leaves": 0, "greedy": 0}


def test_a_command_is_asked_once_for_all_answers(tmp_path: Path) -> None:
    """It gets the question and the answers as JSON; scores out of range are refused."""
    program = tmp_path / "grade.py"
    program.write_text(
        "import json, sys\n"
        "told = json.load(sys.stdin)\n"
        "right = told['question']['references'][0]\n"
        "scores = {name: len(text) / len(right) for name, text in told['answers'].items()}\n"
        "print(json.dumps(scores))"
    )
    question = Question(query="?", references=("four",))
    spec = f"command:{sys.executable} {program}"
    assert graded(spec, question, ada="yo", bob="four").scores == {"ada": 0.5, "bob": 1}
    sheet = graded(spec, question, ada="far too long")
    assert sheet.scores == {} and "not in [0, 1]" in sheet.problems[spec]


def test_a_judge_compares_in_both_orders() -> None:
    """A judge who always prefers what stands first finds only ties; a fair one ranks."""

    async def biased(_: str, prompt: str, words: Sequence[str]) -> str:
        return "A"

    async def fair(model: str, prompt: str, words: Sequence[str]) -> str:
        assert model == "judge-dredd" and set(words) == {"A", "B", "tie"}
        first, second = prompt.split("[A]")[1].split("[B]")
        return "A" if first.count("!") > second.count("!") else "B"

    question = Question(query="?")
    answers = {"ada": "hm", "bob": "yes! well", "cy": "yes!! so"}
    sheet = graded("judge:judge-dredd", question, GradingContext(ask=biased), **answers)
    assert sheet.scores == {"ada": 0.5, "bob": 0.5, "cy": 0.5}
    sheet = graded("judge:judge-dredd", question, GradingContext(ask=fair), **answers)
    assert sheet.scores == {"ada": 0, "bob": 0.5, "cy": 1}


def test_a_tie_is_not_asked_about_twice() -> None:
    """Nobody can win a pair that one order ties, and pairs come one after another."""
    asked: list[str] = []

    async def ask(_: str, prompt: str, words: Sequence[str]) -> str:
        asked.append(prompt)
        return "tie" if "hm" in prompt else "A"

    sheet = graded(
        "judge:j", Question(query="?"), GradingContext(ask=ask), ada="hm", bob="y", cy="n"
    )
    assert set(sheet.scores.values()) == {0.5} and len(asked) == 2 + 2


def test_a_judge_without_a_verdict_gives_no_score() -> None:
    """A single answer is graded from 1 to 10; words without a number are a problem, not a zero."""

    async def ask(_: str, prompt: str, words: Sequence[str]) -> str:
        return "10" if "splendid" in prompt else "Well..."

    context = GradingContext(ask=ask)
    assert graded("judge:j", Question(query="?"), context, ada="splendid").scores == {"ada": 1}
    sheet = graded("judge:j", Question(query="?"), context, ada="bad")
    assert sheet.scores == {} and "no grade" in sheet.problems["judge:j"]


def test_a_reward_models_logits_are_kept_raw_and_as_a_softmax(tmp_path: Path) -> None:
    """The shares are transformers' own logits through a softmax, and sum to one."""
    folder = save_bert(tmp_path / "reward", ["yes", "no", "why"], labels=1)
    sheet = graded(f"reward:{folder}", Question(query="why"), ada="yes", bob="no no")
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        pairs = [tokenizer("why", text, return_tensors="pt") for text in ("yes", "no no")]
        logits = torch.cat([model(**pair).logits[0] for pair in pairs])
    assert list(sheet.grades[f"reward:{folder}"].values()) == pytest.approx(
        logits.tolist(), abs=1e-5
    )
    assert list(sheet.scores.values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)


def test_similarity_is_highest_for_the_reference_itself(tmp_path: Path) -> None:
    """The answer that equals a reference has cosine 1; the closest of several references counts."""
    folder = save_bert(tmp_path / "encoder", ["yes", "no", "why"])
    question = Question(query="?", references=("yes yes", "no"))
    sheet = graded(f"similarity:{folder}", question, ada="no", bob="why why no")
    assert sheet.scores["ada"] == pytest.approx(1, abs=1e-5)
    assert 0 <= sheet.scores["bob"] < 1


def test_graders_are_weighed_and_a_missing_one_is_left_out() -> None:
    """Weights are relative; where one grader cannot grade, the others' mean stands."""
    specs = ["3*exact", "contains"]
    question = Question(query="?", references=("Paris",))
    sheet = graded(specs, question, ada="Paris", bob="in Paris")
    assert sheet.scores == {"ada": 1, "bob": 0.25}
    assert sheet.grades == {"exact": {"ada": 1, "bob": 0}, "contains": {"ada": 1, "bob": 1}}
    sheet = graded(["exact", "regex:a"], Question(query="?"), ada="a")
    assert sheet.scores == {"ada": 1}
    assert sheet.problems == {"exact": "the question has no reference"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exakt", "'exakt' is unknown; allowed are choice, code"),
        ("0*exact", "must be > 0"),
        ("x*exact", "is not \\[WEIGHT"),
        ("exact:x", "takes no argument"),
        ("numeric:some", "not a number"),
        ("numeric:-1", "not in"),
        ("numeric:nan", "not in"),
        ("regex:(", "not a pattern"),
        ("judge", "needs a model"),
        ("judge:base", "no pool or server"),
        ("reward", "needs a sequence classifier"),
        ("reward:/nowhere", "grade: reward:/nowhere cannot be used: .*is not a Hugging Face"),
        ("similarity:/nowhere", "grade: similarity:/nowhere cannot be used: /nowhere is not"),
        ("command:", "needs a program"),
        ("command:/nowhere/grade", "/nowhere/grade is no program"),
        ('command:"grade', "No closing quotation"),
    ],
)
def test_a_grader_that_cannot_be_is_refused_by_name(spec: str, message: str) -> None:
    """Before anything is asked, with what is allowed."""
    with pytest.raises(PolicyError, match=message):
        Panel([spec], GradingContext())


@pytest.mark.parametrize("kind", ["reward", "similarity"])
def test_weights_that_cannot_be_read_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    """A folder that looks like a model is tried once, not at every question of a long run."""
    save_bert(tmp_path, ["yes"], labels=1 if kind == "reward" else None)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(PolicyError, match=f"grade: {kind}:{tmp_path} cannot be used: "):
        Panel([f"{kind}:{tmp_path}"], GradingContext())


def test_a_grader_named_twice_is_refused() -> None:
    """Which of two weights would count?"""
    with pytest.raises(PolicyError, match="exact is named 2 times"):
        Panel(["exact", "0.5*exact"], GradingContext())


def test_a_sheet_survives_json() -> None:
    """The journal of a collection keeps sheets as JSON."""
    sheet = graded("exact", Question(query="?", references=("a",)), ada="a")
    told = {"scores": sheet.scores, "grades": sheet.grades, "problems": sheet.problems}
    assert Sheet(**json.loads(json.dumps(told))) == sheet


def test_a_judge_goes_by_the_model_that_has_its_name() -> None:
    """What one judge said counts for nothing where another model has its name now."""

    async def ask(model: str, prompt: str, words: Sequence[str]) -> str:
        raise AssertionError

    def bases(state: str, spec: str) -> dict[str, str]:
        context = GradingContext(ask=ask, place=lambda name: (name, state))
        return Panel([spec], context).bases

    assert bases("trained", "judge:base") == bases("trained", "2*judge:base")
    assert bases("trained", "judge:base") != bases("trained again", "judge:base")


def test_a_command_may_be_longer_than_a_files_name() -> None:
    """Words of a command are looked up as files, whatever they are."""
    spec = f"command:sh -c 'true {'x' * 5000}'"
    assert len(Panel([spec], GradingContext()).bases) == 1
