"""Which plans a budget can choose from, and how good they are taken to be."""

import pytest

from policies.base import Decision
from policies.budget.candidates import candidates, key_of, plan_of, plan_quality
from policies.laws.scaling import EnsembleLaw
from policies.plan import Answer, Best, Cascade

LAW = EnsembleLaw(L0=0.5, a=1.0, b=0.2)
SCORES = {"a": 0.9, "b": 0.7, "c": 0.5}


def answer(*names, **fields):
    """Return an `Answer` of these members."""
    return Answer(members=names, **fields)


def keys(decision, **options):
    """Return the candidates' keys, in order."""
    arguments = {"law": None, "groups": (), **options}
    return list(candidates(decision, **arguments))


def test_the_policys_own_plan_comes_first():
    """So that it wins where nothing is better."""
    decision = Decision(plan=answer("b"), scores=SCORES)
    assert keys(decision) == [("b",), ("a",), ("c",)]


def test_a_fused_plan_is_trimmed_by_weight():
    """The heaviest members stay, larger ensembles first."""
    decision = Decision(plan=answer("a", "b", "c", weights=(1, 5, 3)))
    assert keys(decision) == [("a", "b", "c"), ("b", "c"), ("b",)]


def test_groups_grow_by_score():
    """The best-scored two, then three; models the policy did not score are left out."""
    decision = Decision(plan=answer("a"), scores=SCORES)
    quality = candidates(decision, law=LAW, groups=[["c", "b", "a", "unscored"]])
    assert set(quality) == {("a",), ("b",), ("c",), ("a", "b"), ("a", "b", "c")}
    assert quality["a", "b"] == pytest.approx(0.8 + 0.2 * (1 - 1 / 2))
    assert quality["a", "b", "c"] == pytest.approx(0.7 + 0.2 * (1 - 1 / 3))


def test_the_marginal_rule_bounds_ensembles():
    """No candidate has more members than asked for, but the policy's own plan stays."""
    decision = Decision(plan=answer("a", "b", "c"), scores=SCORES)
    found = keys(decision, groups=[["a", "b", "c"]], max_members=2)
    assert found[0] == ("a", "b", "c")
    assert max(len(key) for key in found[1:]) == 2


def test_cascades_lose_their_last_stages_or_become_one_stage():
    """Shorter cascades first, then the stages alone, the last and strongest first."""
    cascade = Cascade(
        stages=(answer("c"), answer("b"), answer("a")), thresholds=(0.5, 0.6), scorer="mine"
    )
    found = keys(Decision(plan=cascade))
    short = Cascade(stages=(answer("c"), answer("b")), thresholds=(0.5,), scorer="mine")
    assert found == [cascade, short, ("a",), ("b",), ("c",)]


def test_votes_lose_candidates():
    """Fewer voters, then each alone."""
    vote = Best(candidates=(answer("a"), answer("b"), answer("c")))
    fewer = Best(candidates=(answer("a"), answer("b")))
    assert keys(Decision(plan=vote)) == [vote, fewer, ("a",), ("b",), ("c",)]


def test_quality_of_nested_plans():
    """A cascade is as good as its best stage, a fusion its weighted mean plus the law's gain."""
    fused = answer("a", "c", weights=(3, 1))
    assert plan_quality(fused, SCORES, LAW) == pytest.approx(0.8 + 0.1)
    cascade = Cascade(stages=(answer("c"), fused), thresholds=(0.5,))
    assert plan_quality(cascade, SCORES, LAW) == pytest.approx(0.9)
    vote = Best(candidates=(answer("a"), answer("b")))
    assert plan_quality(vote, SCORES, LAW) == pytest.approx(0.8 + 0.1)


def test_predictions_stay_within_zero_and_one():
    """A gain on top of a high score does not promise more than certainty."""
    decision = Decision(plan=answer("a", "b"), scores={"a": 1.0, "b": 1.0})
    assert candidates(decision, law=LAW, groups=())["a", "b"] == 1.0


def test_trimmed_plans_keep_the_policys_weights_and_rule():
    """What is left of a fusion is fused as the policy wanted."""
    decision = Decision(plan=answer("a", "b", "c", weights=(1, 5, 3), rule="product"))
    assert plan_of(("b", "c"), decision) == answer("b", "c", weights=(5, 3), rule="product")
    assert plan_of(("b",), decision) == answer("b")
    assert plan_of(("a", "b", "c"), decision) is decision.plan
    assert key_of(decision.plan) == ("a", "b", "c")


def test_a_contrast_is_left_with_its_first_member():
    """Its members have roles, so no other part of it means the same."""
    decision = Decision(plan=answer("a", "b", "c", rule="contrastive"), scores=SCORES)
    assert keys(decision, max_members=2)[:2] == [("a", "b", "c"), ("a",)]
    assert plan_of(("a", "b"), decision) == answer("a", "b")


def test_a_gate_keeps_its_lead():
    """The first member decides when to fuse, however light it is; other fields stay."""
    plan = answer("a", "b", "c", weights=(1, 5, 3), rule="gated", gate=0.7)
    decision = Decision(plan=plan)
    assert keys(decision) == [("a", "b", "c"), ("a", "b"), ("a",)]
    assert plan_of(("a", "b"), decision) == answer("a", "b", weights=(1, 5), rule="gated", gate=0.7)
