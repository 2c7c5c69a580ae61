"""Plans played on stored answers: whose answer is taken, and what that costs."""

import pytest

from policies.cascade.base import Attempt, Confidence
from policies.errors import OutcomesError
from policies.evaluation.play import Played, play
from policies.fixed import Fixed
from policies.footprint import Rates
from policies.outcomes import AnswerLogprobs, Outcome
from policies.plan import Answer, Best, Cascade, Plan

NAMES = ("ada", "bob", "cy")
RATES = {name: Rates(usd_per_input_token=0, usd_per_output_token=1) for name in NAMES}
PLANS = {name: Answer(members=(name,)) for name in NAMES}


class Longest:
    """Prefers long answers, and notes what others said."""

    def __init__(self) -> None:
        self.earlier: list[tuple[str, ...]] = []

    def score(self, attempt: Attempt) -> float:
        """Return the answer's length in tenths."""
        self.earlier.append(attempt.earlier)
        return len(attempt.answer) / 10


def row(**changes: object) -> Outcome:
    """A query to which the second model's answer is right."""
    fields = {
        "query": "q",
        "scores": {"ada": 0, "bob": 1, "cy": 0},
        "outputs": {"ada": "no", "bob": "yes!", "cy": "No."},
        "logprobs": {"ada": AnswerLogprobs(mean=-2, min=-3, num_tokens=4)},
        "prompt_tokens": 3,
        "output_tokens": {"ada": 4, "bob": 5, "cy": 6},
    }
    return Outcome(**{**fields, **changes})  # type: ignore[arg-type]


def played(plan: Plan, outcome: Outcome, **scorers: object) -> Played:
    """Play a fixed plan."""
    known = {"confidence": Confidence(), **scorers}
    return play(Fixed(plan=plan), outcome, rates=RATES, scorers=known)  # type: ignore[arg-type]


def test_an_unsure_answer_goes_on_and_both_are_paid() -> None:
    """e^-2 is below the threshold: the second stage answers."""
    cascade = Cascade(stages=(PLANS["ada"], PLANS["bob"]), thresholds=(0.5,))
    found = played(cascade, row())
    assert (found.name, found.quality, found.usd) == ("bob", 1, 9)
    assert found.used == (("ada", 4), ("bob", 5))
    known = row(costs={"ada": 0.25, "bob": 0.5})
    assert played(cascade, known).usd == 0.75


def test_best_of_votes_or_scores_as_serving_does() -> None:
    """Votes are normalised texts; a scorer sees the others' answers beside each."""
    candidates = tuple(PLANS.values())
    assert played(Best(candidates=candidates, select="majority"), row()).name == "ada"
    longest = Longest()
    best = Best(candidates=candidates, select="scorer", scorer="longest")
    found = played(best, row(), longest=longest)
    assert (found.name, found.usd) == ("bob", 15)
    assert longest.earlier[-3:] == [("yes!", "No."), ("no", "No."), ("no", "yes!")]


def test_log_probabilities_are_optional() -> None:
    """A stage without them counts as certain, as an engine that tells none does in serving."""
    cascade = Cascade(stages=(PLANS["bob"], PLANS["ada"]), thresholds=(0.5,))
    assert played(cascade, row()).name == "bob"


def test_what_nobody_knows_is_refused_by_name() -> None:
    """A fusion's answer, a model's missing score or text; unknown lengths leave the cost open."""
    with pytest.raises(OutcomesError, match="combines several"):
        played(Answer(members=("ada", "bob")), row())
    with pytest.raises(OutcomesError, match="'cy' has no score"):
        played(PLANS["cy"], row(scores={"ada": 0}))
    cascade = Cascade(stages=(PLANS["ada"], PLANS["bob"]), thresholds=(0.5,))
    with pytest.raises(OutcomesError, match="'ada' has no output"):
        played(cascade, row(outputs={}))
    assert played(PLANS["ada"], row(prompt_tokens=None)).usd is None
