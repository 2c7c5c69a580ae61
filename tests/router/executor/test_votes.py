"""Votes among answers."""

import pytest
from hypothesis import given, seed
from hypothesis import strategies as st

from policies.best import rate
from policies.cascade.base import Attempt, normalise
from policies.plan import Answer, Best
from router.executor.judging import decided

PLAN = Answer(members=("one",))


def majority(votes: list[str]) -> int:
    """Return whose vote wins."""
    attempts = [
        Attempt(query="?", plan=PLAN, answer=vote, logprob_mean=0, logprob_min=0, num_tokens=1)
        for vote in votes
    ]
    scores = rate(Best(candidates=(PLAN,) * len(votes)), attempts, {})
    return max(range(len(votes)), key=scores.__getitem__)


@pytest.mark.parametrize(
    ("one", "other"), [("42", " 42.\n"), ("Yes!", "yes"), ("a  b", "A\tB"), ("ﬁne", "fine")]
)
def test_same_answers(one: str, other: str) -> None:
    """Case, spacing, closing marks and compatibility characters don't change an answer."""
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(("one", "other"), [("4.2", "42"), ("-3", "3"), ("a b", "ab")])
def test_different_answers(one: str, other: str) -> None:
    """Marks inside an answer do."""
    assert normalise(one) != normalise(other)


def test_a_tie_goes_to_the_earlier() -> None:
    """Of texts with as many votes the one that came first wins."""
    assert majority(["b", "a", "a", "b"]) == 0
    assert majority(["c", "a", "b", "a"]) == 1


@seed(7)
@given(
    votes=st.lists(st.sampled_from("abc"), min_size=1, max_size=6),
    rest=st.lists(st.sampled_from("abc"), max_size=6),
)
def test_decided_means_decided(votes: list[str], rest: list[str]) -> None:
    """Once a vote is decided, no further votes change the winner (seed 7)."""
    winner = majority(votes)
    if decided(votes, len(rest)):
        assert (votes + rest)[majority(votes + rest)] == votes[winner]
