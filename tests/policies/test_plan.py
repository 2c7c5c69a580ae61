"""Plans: reading, writing, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.errors import PlanError
from policies.plan import Answer, Best, Cascade, Plan, answers, from_json, members, to_json

NAMES = st.sampled_from(["ada", "bob", "cyd", "dee"])
PROBABILITIES = st.floats(0, 1)


@st.composite
def fused(draw: st.DrawFn) -> Answer:
    """Draw an answer of one to four members."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    weights = draw(
        st.none() | st.lists(st.floats(0.1, 9), min_size=len(names), max_size=len(names))
    )
    weighting = draw(st.sampled_from(["static", "router", "perplexity", "evidence"]))
    found = weighting in ("perplexity", "evidence")
    return Answer(
        members=tuple(names),
        weights=None if weights is None else tuple(weights),
        rule=draw(st.sampled_from(["mixture", "product", "gated"])),
        weighting=weighting,
        gate=draw(PROBABILITIES),
        temperature=draw(st.none() | st.floats(0.1, 9)) if found else None,
        update=draw(st.booleans()) if found else False,
    )


@st.composite
def cascades(draw: st.DrawFn, inner: st.SearchStrategy[Plan]) -> Cascade:
    """Draw a cascade of one to three `inner` stages."""
    stages = draw(st.lists(inner, min_size=1, max_size=3))
    size = len(stages) - 1
    thresholds = draw(st.lists(PROBABILITIES, min_size=size, max_size=size))
    limits = st.none() | st.floats(0.001, 99)
    timeouts_s = draw(st.none() | st.lists(limits, min_size=size, max_size=size).map(tuple))
    return Cascade(stages=tuple(stages), thresholds=tuple(thresholds), timeouts_s=timeouts_s)


def bests(inner: st.SearchStrategy[Plan]) -> st.SearchStrategy[Best]:
    """Draw a best-of over one to three `inner` candidates."""
    return st.builds(
        Best,
        candidates=st.lists(inner, min_size=1, max_size=3).map(tuple),
        select=st.sampled_from(["majority", "confidence", "scorer", "ranker"]),
    )


PLANS: st.SearchStrategy[Plan] = st.recursive(
    fused(), lambda inner: cascades(inner) | bests(inner), max_leaves=6
)


@given(PLANS)
def test_json_round_trip(plan: Plan) -> None:
    """Any nesting of plans reads back from its own JSON unchanged."""
    assert from_json(to_json(plan)) == plan


@given(PLANS)
def test_members_are_those_of_the_answers(plan: Plan) -> None:
    """`members` lists each model that some answer names exactly once."""
    named = [name for answer in answers(plan) for name in answer.members]
    assert set(members(plan)) == set(named)
    assert len(members(plan)) == len(set(named))


@pytest.mark.parametrize("named", ["router", "perplexity", "evidence"])
def test_weights_can_be_named(named: str) -> None:
    """A weighting's name in place of numbers says how the weights are found."""
    plan = from_json({"answer": {"members": ["ada", "bob"], "weights": named}})
    assert plan == Answer(members=("ada", "bob"), weighting=named)  # type: ignore[arg-type]
    uniform = from_json({"answer": {"members": ["ada", "bob"], "weights": "uniform"}})
    assert uniform == Answer(members=("ada", "bob"))


def test_a_bare_name_is_a_plan() -> None:
    """A model's name alone means: that model answers."""
    assert from_json("ada") == Answer(members=("ada",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (7, "plan: 7 is not"),
        ({}, "plan: {} is not"),
        ({"vote": {}}, "'vote' is unknown; allowed are answer, cascade, best"),
        ({"answer": ["ada"]}, r"plan.answer: \['ada'\] is not an object"),
        ({"answer": {}}, "'members' is missing"),
        ({"answer": {"members": []}}, "answer.members is empty"),
        ({"answer": {"members": ["a", "a"]}}, "names a model twice"),
        ({"answer": {"members": "ada"}}, "'ada' is not a list"),
        ({"answer": {"members": [1]}}, "not a list of names"),
        ({"answer": {"members": ["a"], "weight": [1]}}, "'weight' is unknown"),
        ({"answer": {"members": ["a"], "weights": [1, 2]}}, "2 entries for 1 members"),
        ({"answer": {"members": ["a"], "weights": [-1]}}, r"weights \[-1.0\]"),
        ({"answer": {"members": ["a"], "weights": [0]}}, "not all of them zero"),
        ({"answer": {"members": ["a"], "weights": [float("nan")]}}, "finite"),
        ({"answer": {"members": ["a"], "weights": [True]}}, "True is not a number"),
        ({"answer": {"members": ["a"], "rule": "sum"}}, "allowed are mixture, product"),
        ({"answer": {"members": ["a"], "weights": "luck"}}, "allowed are uniform, router"),
        ({"answer": {"members": ["a"], "weighting": "luck"}}, "allowed are static, router"),
        ({"answer": {"members": ["a"], "weights": "router", "weighting": "router"}}, "give one"),
        ({"answer": {"members": ["a"], "gate": 2}}, r"answer.gate: 2.0 is not in \[0, 1\]"),
        ({"answer": {"members": ["a"], "contrast": -1}}, r"contrast: -1.0 is not in"),
        ({"answer": {"members": ["a"], "temperature": 1}}, "temperature means nothing"),
        ({"answer": {"members": ["a"], "update": True}}, "update means nothing"),
        ({"answer": {"members": ["a"], "update": 1}}, "1 is not true or false"),
        (
            {"cascade": {"stages": ["a", "b"], "thresholds": [0.5], "timeouts_s": [1, 2]}},
            "timeouts_s has 2 entries; 2 stages need 1",
        ),
        (
            {"cascade": {"stages": ["a", "b"], "thresholds": [0.5], "timeouts_s": [0]}},
            "timeouts_s: 0.0 is not a finite number > 0",
        ),
        (
            {"cascade": {"stages": ["a", "b"], "thresholds": [0.5], "timeouts_s": ["1s"]}},
            "timeouts_s: '1s' is not a number",
        ),
        (
            {"answer": {"members": ["a"], "weights": "evidence", "temperature": 0}},
            "temperature: 0.0 is not a finite number > 0",
        ),
        ({"answer": {"members": ["a"], "rule": "contrastive"}}, "needs two members"),
        (
            {"answer": {"members": ["a", "b"], "rule": "contrastive", "weights": [1, 1]}},
            "takes none",
        ),
        ({"best": {"candidates": ["a"], "scorer": 3}}, "best.scorer: 3"),
        ({"cascade": {"stages": ["a", "b"]}}, "0 entries; 2 stages need 1"),
        ({"cascade": {"stages": ["a", "b"], "thresholds": [2]}}, r"2.0 is not in \[0, 1\]"),
        ({"cascade": {"stages": ["a"], "scorer": 3}}, "cascade.scorer: 3"),
        ({"best": {"candidates": []}}, "best.candidates is empty"),
        ({"best": {"candidates": ["a"], "select": "first"}}, "allowed are majority, confidence"),
    ],
)
def test_bad_plans_are_refused_by_name(data: object, message: str) -> None:
    """What is wrong, the value and what is allowed stand in the error."""
    with pytest.raises(PlanError, match=message):
        from_json(data)
