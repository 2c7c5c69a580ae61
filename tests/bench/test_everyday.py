"""The grader of everyday requests tells an assistant's answer from a calculator's."""

import pytest

from models.pool import DEFAULT_POOL
from policies.outcomes import read_outcomes
from tests.bench.everyday import everyday

REQUESTS = {request.text: request for request in everyday()}


@pytest.mark.parametrize(
    ("request_text", "answer", "score"),
    [
        ("What is the capital of France?", "The capital of France is Paris.", 1),
        ("What is the capital of France?", "Parisian cafes are lovely.", 0),
        ("How many strings does a guitar have?", "A guitar usually has six strings.", 1),
        ("How many strings does a guitar have?", "A guitar has 64 strings.", 0),
        ("Sort: plum, cherry, lemon", "1. cherry\n2. lemon\n3. plum", 1),
        ("Sort: plum, cherry, lemon", "Sorted: cherry, lemon and plum", 1),
        ("Sort: plum, cherry, lemon", "plum, cherry, lemon", 0),
        ("What is gravity?", "Gravity is the force that pulls things to each other.", 1),
        ("What is gravity?", "I like to eat apples and pears in the garden with you.", 0),
        ("What is gravity?", "Gravity " * 12, 0),
        ("What is gravity?", "La gravité est une force qui attire les corps vers la Terre.", 0),
        ("What is gravity?", "Gravity is 20, 50, 27 in ascending order, and that is it.", 0),
        ("Good night!", "Good night! I hope that you sleep well.", 1),
    ],
)
def test_an_answer_is_judged_by_what_was_asked(
    request_text: str, answer: str, score: float
) -> None:
    """By the reference's words where there is one, else by English about the subject."""
    assert REQUESTS[request_text].grade(answer) == score


def test_the_recorded_scores_are_the_graders() -> None:
    """Of the shipped pool's answers, of which no toy's to an open request is usable."""
    for row in read_outcomes(DEFAULT_POOL / "everyday.jsonl"):
        request = REQUESTS[row.query]
        assert row.scores == {name: request.grade(text) for name, text in row.outputs.items()}
        if not request.accepted:
            assert {name for name, score in row.scores.items() if score} <= {"general"}
