"""Votes among answers."""

import pytest
from hypothesis import given, seed
from hypothesis import strategies as st

from policies.cascade.base import normalise
from router.executor.judging import decided, majority


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


def test_majority_of_nobody() -> None:
    """Without votes nobody wins."""
    assert majority([None, None]) is None


@seed(7)
@given(
    votes=st.lists(st.sampled_from("abc"), min_size=1, max_size=6),
    rest=st.lists(st.sampled_from("abc"), max_size=6),
)
def test_decided_means_decided(votes: list[str], rest: list[str]) -> None:
    """Once a vote is decided, no further votes change the winner (seed 7)."""
    winner = majority(votes)
    assert winner is not None
    if decided(votes, len(rest)):
        final = majority(votes + rest)
        assert final is not None
        assert (votes + rest)[final] == votes[winner]
