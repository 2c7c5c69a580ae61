"""Plans of models that are not there become plans of those that are."""

import pytest

from policies.base import ModelFacts, Query
from policies.fixed import Fixed
from policies.footprint import Rates
from policies.plan import Answer, Best, Cascade, Plan
from policies.standins import StandInFacts, StandIns, stand_in

GONE = {"gone": "base"}


def _one(name: str) -> Answer:
    return Answer(members=(name,))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (_one("code"), _one("code")),
        (_one("gone"), _one("base")),
        (
            Answer(members=("code", "gone"), weights=(1, 2)),
            Answer(members=("code", "base"), weights=(1, 2)),
        ),
        (
            Answer(members=("base", "gone", "code"), weights=(1, 2, 3)),
            Answer(members=("base", "code"), weights=(1, 3)),
        ),
        (Best(candidates=(_one("gone"), _one("base"))), Best(candidates=(_one("base"),))),
        (
            Cascade(
                stages=(_one("code"), _one("gone"), _one("base")),
                thresholds=(0.9, 0.5),
                timeouts_s=(1.0, None),
            ),
            Cascade(stages=(_one("code"), _one("base")), thresholds=(0.9,), timeouts_s=(1.0,)),
        ),
    ],
    ids=["untouched", "alone", "fused", "fused twice", "best", "cascade"],
)
def test_plans(plan: Plan, expected: Plan) -> None:
    """Members are renamed, and what then stands there twice goes once, with its numbers."""
    assert stand_in(plan, GONE) == expected


def test_a_policy_decides_and_names_what_can_run() -> None:
    """Decision and plans name the stand-in, whose facts the policy had."""
    policy = StandIns(Fixed(plan=_one("gone")), GONE)
    assert policy.decide(Query(text="?")).plan == _one("base")
    assert list(policy.plans()) == [_one("base")]
    rates = Rates(usd_per_input_token=1, usd_per_output_token=2)
    facts = StandInFacts({"base": ModelFacts(name="base", rates=rates)}, GONE)
    assert facts["gone"].rates == rates
    assert (list(facts), len(facts)) == (["base", "gone"], 2)
