"""What the beginning of an answer says of its confidence in the end."""

import math

from hypothesis import given
from hypothesis import strategies as st

from policies.cascade.base import Attempt, Confidence
from policies.plan import Answer

LOGPROBS = st.lists(st.floats(-30, 0), min_size=1, max_size=40)


def attempt(logprobs: list[float]) -> Attempt:
    """Return the attempt whose tokens had these log-probabilities."""
    return Attempt(
        query="q",
        plan=Answer(members=("a",)),
        answer="x" * len(logprobs),
        logprob_mean=math.fsum(logprobs) / len(logprobs),
        logprob_min=min(logprobs),
        num_tokens=len(logprobs),
    )


@given(logprobs=LOGPROBS, size=st.integers(1, 40), spare=st.integers(0, 40))
def test_the_ceiling_is_above_every_answer(logprobs: list[float], size: int, spare: int) -> None:
    """No answer scores above the ceiling of any of its prefixes, so none is stopped wrongly."""
    scorer = Confidence()
    ceiling = scorer.ceiling(attempt(logprobs[:size]), len(logprobs) + spare)
    assert scorer.score(attempt(logprobs)) <= ceiling + 1e-12


@given(logprobs=LOGPROBS, spare=st.integers(0, 40))
def test_the_ceiling_can_be_reached(logprobs: list[float], spare: int) -> None:
    """No lower bound would do: an answer that is certain from here on scores the ceiling."""
    scorer = Confidence()
    certain = attempt([*logprobs, *[0.0] * spare])
    ceiling = scorer.ceiling(attempt(logprobs), len(logprobs) + spare)
    assert math.isclose(scorer.score(certain), ceiling, rel_tol=1e-9, abs_tol=1e-12)
