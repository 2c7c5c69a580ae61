"""Texts that would have a pattern try every way to fail take time with their length alone."""

import time
from collections.abc import Callable

import pytest

from policies.grading.base import Question
from policies.grading.numbers import numeric
from policies.grading.programs import _FENCE as PROGRAM
from policies.grading.texts import choice, exact, json_value
from policies.routing.phrases import clauses

NUM_CHARACTERS = 20_000
PARTS = (
    *("a", "A", "1", " ", "\n", " \n", ".", ",", "(", "[", "-", "'", '"', "1,", ", a", "A\n"),
    *(". ", "1/", "1 /", "e1", "```", "``` ", "\\frac{1}", "answer is ", "Ab ", "\u0301", "\u202e"),
    *("1'000", "'000", "1 million ", "1×10", "×10^1", "1\\times 10^{"),
)
QUESTION = Question(query="?", references=("B",), choices=("A", "B"))
READERS: dict[str, Callable[[str], object]] = {
    "clauses": clauses,
    "choice": lambda text: choice(QUESTION, text),
    "exact": lambda text: exact(QUESTION, text),
    "json": lambda text: json_value(QUESTION, text),
    "numeric": lambda text: numeric("")(Question(query="?", references=("1",)), text),
    "program": PROGRAM.search,
}


@pytest.mark.parametrize("name", READERS)
def test_time_is_linear(name: str) -> None:
    """Twenty thousand characters of anything, begun in any way, are read at once."""
    for part in PARTS:
        for start in ("", "```", "answer is "):
            text = start + part * (NUM_CHARACTERS // len(part)) + "\x01"
            began_s = time.thread_time()
            READERS[name](text)
            assert time.thread_time() - began_s < 0.5, (start, part)
