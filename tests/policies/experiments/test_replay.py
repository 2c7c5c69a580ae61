"""Replay: exact from outcomes, off-policy from a log, and refused where the past says nothing."""

from __future__ import annotations

import numpy as np
import pytest

from policies.base import Decision, Query
from policies.cascade.base import Confidence
from policies.errors import ExperimentError
from policies.experiments.replay import LoggedRequest, replay_log, replay_outcomes
from policies.fixed import Fixed
from policies.footprint import Rates
from policies.outcomes import AnswerLogprobs, Outcome
from policies.plan import Answer, Cascade, Plan, to_json

RATES = {
    "cheap": Rates(usd_per_input_token=0, usd_per_output_token=1),
    "dear": Rates(usd_per_input_token=0, usd_per_output_token=10),
}


def answer(*names: str) -> Answer:
    """A plan of these members."""
    return Answer(members=names)


def outcome(i: int, *, cheap: float, sure: bool) -> Outcome:
    """A query that `dear` gets right; `cheap` may, and may be sure of it."""
    return Outcome(
        id=f"q{i}",
        query=f"query {i}",
        scores={"cheap": cheap, "dear": 1.0},
        outputs={"cheap": "yes", "dear": "no"},
        logprobs={
            "cheap": AnswerLogprobs(mean=-0.01 if sure else -2.0, min=-3.0, num_tokens=2),
            "dear": AnswerLogprobs(mean=-0.01, min=-0.02, num_tokens=2),
        },
        prompt_tokens=5,
        output_tokens={"cheap": 1, "dear": 1},
    )


def test_cascades_are_played_out_on_outcomes() -> None:
    """The cascade keeps sure answers and pays for both models where it goes on."""
    outcomes = [
        *(outcome(i, cheap=1.0, sure=True) for i in range(6)),
        *(outcome(i, cheap=0.0, sure=False) for i in range(6, 9)),
        outcome(9, cheap=0.0, sure=True),
    ]
    cascade = Cascade(stages=(answer("cheap"), answer("dear")), thresholds=(0.5,))
    scorers = {"confidence": Confidence()}
    found = replay_outcomes(outcomes, Fixed(plan=cascade), rates=RATES, scorers=scorers)
    assert found.quality.value == pytest.approx(0.9)
    assert found.quality.low < 0.9 < found.quality.high
    assert found.usd is not None
    assert found.usd.value == pytest.approx((10 * 1 + 3 * 10) / 10)


@pytest.mark.parametrize("plan", [answer("cheap", "dear"), answer("unknown")])
def test_answers_that_outcomes_lack_are_refused(plan: Plan) -> None:
    """A fused answer, or a model without a score, cannot be known from outcomes."""
    with pytest.raises(ExperimentError, match="nothing is known of the answer"):
        replay_outcomes(
            [outcome(0, cheap=1.0, sure=True)], Fixed(plan=plan), rates=RATES, scorers={}
        )


class ByLength:
    """Sends short queries to cheap, the others to dear."""

    def decide(self, query: Query) -> Decision:
        """Choose by the query's length."""
        return Decision(plan=answer("cheap" if len(query.text) < 30 else "dear"))

    def members(self) -> tuple[str, ...]:
        """Both models."""
        return ("cheap", "dear")


POLICIES = {
    "small": Fixed(plan=answer("cheap")),
    "large": Fixed(plan=answer("dear")),
    "routed": ByLength(),
    "fused": Fixed(plan=answer("cheap", "dear")),
}


def log(num: int, *, seed: int) -> tuple[list[LoggedRequest], float]:
    """A log of two fixed arms, 70 to 30, and the routed policy's true quality.

    Short queries are right half of the time with cheap, long ones almost never.
    """
    rng = np.random.default_rng(seed)
    requests, truth = [], []
    for _ in range(num):
        long = rng.random() < 0.4
        query = Query(text="x" * (50 if long else 10), prompt_tokens=50 if long else 10)
        right = {"small": rng.random() < (0.1 if long else 0.5), "large": rng.random() < 0.8}
        policy = "small" if rng.random() < 0.7 else "large"
        truth.append(right["large" if long else "small"])
        requests.append(
            LoggedRequest(
                query=query,
                chances={"small": 0.7, "large": 0.3},
                policy=policy,
                plan=to_json(POLICIES[policy].decide(query).plan),
                usd=1.0 if policy == "small" else 10.0,
                score=float(right[policy]) if rng.random() < 0.8 else None,
            )
        )
    return requests, float(np.mean(truth))


def test_a_router_is_judged_from_two_fixed_arms() -> None:
    """The estimates hold the truth, for quality and cost (seed 1; misses with probability 5%)."""
    requests, truth = log(3000, seed=1)
    found = replay_log(requests, POLICIES["routed"], policies=POLICIES)
    assert found.quality.low <= truth <= found.quality.high
    assert found.quality.high - found.quality.low < 0.1
    assert found.usd is not None
    assert found.usd.low <= 0.6 * 1 + 0.4 * 10 <= found.usd.high
    assert found.off_policy is not None
    assert found.off_policy.num_effective < found.num_requests < 3000


def test_what_the_log_never_tried_is_refused() -> None:
    """A fused plan was in no arm."""
    with pytest.raises(ExperimentError, match="would get a plan that the log never tries"):
        replay_log(log(200, seed=2)[0], POLICIES["fused"], policies=POLICIES)


def test_arms_that_decide_differently_now_are_refused() -> None:
    """Propensities are only known while the arms' policies are what they were."""
    swapped = {**POLICIES, "small": POLICIES["large"], "large": POLICIES["small"]}
    with pytest.raises(ExperimentError, match="another plan from their own arm"):
        replay_log(log(200, seed=3)[0], POLICIES["routed"], policies=swapped)


def test_a_log_without_feedback_says_nothing_of_quality() -> None:
    """Refused, rather than estimated as zero."""
    silent = [
        LoggedRequest(
            query=r.query, chances=r.chances, policy=r.policy, plan=r.plan, usd=r.usd, score=None
        )
        for r in log(50, seed=4)[0]
    ]
    with pytest.raises(ExperimentError, match="no logged request has feedback"):
        replay_log(silent, POLICIES["large"], policies=POLICIES)
