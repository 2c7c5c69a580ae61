"""The fused policy and the priors that plans wait for."""

from pathlib import Path

import pytest

from policies.base import Decision, ModelFacts, Policy, Query, members_of
from policies.errors import PolicyError
from policies.footprint import Rates
from policies.fused import Fused, needs_prior, with_prior, without_prior
from policies.plan import Answer, Best, Cascade, Plan
from policies.registry import build_policy

FACTS = {
    name: ModelFacts(name=name, rates=Rates(usd_per_input_token=0, usd_per_output_token=0))
    for name in ("ada", "bob", "cyd")
}
EVIDENCE = Answer(members=("ada", "bob", "cyd"), weighting="evidence", temperature=8)


class Scores(Policy):
    """A router that always says the same."""

    def __init__(self, **scores: float) -> None:
        self.scores = scores

    def decide(self, query: Query) -> Decision:
        """Return the scores."""
        return Decision(plan=Answer(members=("ada",)), scores=self.scores)

    def plans(self) -> tuple[Plan, ...]:
        """Return the one plan."""
        return (Answer(members=("ada",)),)


def test_the_routers_scores_become_the_prior() -> None:
    """Weights by router and evidence get the normalised scores; the rest of the plan stays."""
    policy = Fused(EVIDENCE, router=Scores(ada=0.6, bob=0.3, cyd=0.1))
    plan = policy.decide(Query(text="?")).plan
    assert isinstance(plan, Answer)
    assert plan.weights == pytest.approx((0.6, 0.3, 0.1))
    assert without_prior(plan) == EVIDENCE


def test_only_the_most_promising_members_are_fused() -> None:
    """`top` keeps the members with the best scores, best first."""
    policy = Fused(EVIDENCE, router=Scores(ada=0.2, bob=0.8, cyd=0.6), top=2)
    plan = policy.decide(Query(text="?")).plan
    assert isinstance(plan, Answer)
    assert plan.members == ("bob", "cyd")
    assert plan.weights == pytest.approx((0.8 / 1.4, 0.6 / 1.4))
    assert members_of(policy) == ("ada", "bob", "cyd")


@pytest.mark.parametrize(("power", "share"), [(0.0, 0.5), (1.0, 0.75), (2.0, 0.9)])
def test_a_power_sharpens_the_prior(power: float, share: float) -> None:
    """Power 0 is uniform, 1 the scores, 2 their squares."""
    plan = with_prior(
        Answer(members=("ada", "bob"), weighting="router"), {"ada": 0.9, "bob": 0.3}, power=power
    )
    assert isinstance(plan, Answer)
    assert plan.weights == pytest.approx((share, 1 - share))


def test_priors_reach_every_level_of_a_plan() -> None:
    """Answers inside cascades and best-ofs get their priors; the others are left alone."""
    static = Answer(members=("ada", "bob"), weights=(1, 2))
    inner = Best(candidates=(static, Answer(members=("bob", "cyd"), weighting="router")))
    plan: Plan = Cascade(stages=(static, inner, EVIDENCE), thresholds=(0.5, 0.5))
    assert needs_prior(plan)
    assert not needs_prior(static)
    filled = with_prior(plan, {"ada": 0.5, "bob": 0.5})
    assert not needs_prior(filled)
    assert isinstance(filled, Cascade)
    assert filled.stages[0] == static
    # cyd has no score and gets the mean of the others.
    assert filled.stages[2] == Answer(
        members=EVIDENCE.members, weighting="evidence", temperature=8, weights=(1 / 3, 1 / 3, 1 / 3)
    )
    assert without_prior(filled) == plan


def test_without_scores_weights_stay_open() -> None:
    """A router that predicts nothing leaves the weights uniform."""
    assert with_prior(EVIDENCE, {}) == EVIDENCE


def test_a_pool_file_describes_a_fusion(tmp_path: Path) -> None:
    """The registry builds the policy from the specification of pool.yaml."""
    spec = {"kind": "fused", "answer": {"members": ["ada", "bob"], "weights": "perplexity"}}
    policy = build_policy(spec, folder=tmp_path, models=FACTS)
    assert policy.decide(Query(text="?")).plan == Answer(
        members=("ada", "bob"), weighting="perplexity"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"answer": {"members": ["ada"], "weights": "router"}}, "fused.router is missing"),
        ({"answer": {"members": ["ada"]}, "top": 1}, "fused.router is missing"),
        ({"answer": {"members": ["ada"]}, "top": 2}, r"fused.top: 2 is not in \[1, 1\]"),
        (
            {"answer": {"members": ["ada"]}, "top": "2"},
            "fused.top: '2' is refused: it should be a valid integer",
        ),
        ({"answer": {"members": ["ada"]}, "prior_power": -1}, "fused.prior_power: -1 is refused"),
        ({"answer": {"members": ["eve"]}}, "names the model 'eve'"),
        ({"answer": {"members": ["ada"]}, "tops": 1}, "'tops' is unknown"),
    ],
)
def test_bad_fusions_are_refused(spec: dict[str, object], message: str, tmp_path: Path) -> None:
    """What is wrong in the specification stands in the error."""
    with pytest.raises(PolicyError, match=message):
        build_policy({"kind": "fused", **spec}, folder=tmp_path, models=FACTS)
