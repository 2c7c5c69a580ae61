"""Plans: reading, writing, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.errors import PlanError
from policies.plan import (
    Answer,
    Best,
    Cascade,
    Plan,
    PlanBounds,
    answers,
    from_json,
    members,
    num_lanes,
    to_json,
)

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
        ({"answer": {"members": "ada"}}, "answer.members: 'ada' is refused: it should be a list"),
        (
            {"answer": {"members": [1]}},
            "answer.members.0: 1 is refused: it should be a valid string",
        ),
        (
            {"answer": {"members": ["a"], "weight": [1]}},
            "'weight' is unknown; allowed are members, weights",
        ),
        ({"answer": {"members": ["a"], "weights": [1, 2]}}, "2 entries for 1 members"),
        (
            {"answer": {"members": ["a"], "weights": [-1]}},
            "answer.weights.0: -1 is refused: it should be greater than or equal to 0",
        ),
        ({"answer": {"members": ["a"], "weights": [0]}}, "not all of them zero"),
        (
            {"answer": {"members": ["a"], "weights": [float("nan")]}},
            "nan is refused: it should be a finite",
        ),
        (
            {"answer": {"members": ["a"], "weights": [True]}},
            "True is refused: it should be a valid number",
        ),
        (
            {"answer": {"members": ["a"], "rule": "sum"}},
            "'sum' is refused: it should be 'mixture', 'product'",
        ),
        ({"answer": {"members": ["a"], "weights": "luck"}}, "allowed are uniform, router"),
        ({"answer": {"members": ["a"], "weighting": "luck"}}, "it should be 'static', 'router'"),
        ({"answer": {"members": ["a"], "weights": "router", "weighting": "router"}}, "give one"),
        (
            {"answer": {"members": ["a"], "gate": 2}},
            "answer.gate: 2 is refused: .* less than or equal to 1",
        ),
        ({"answer": {"members": ["a"], "contrast": -1}}, "contrast: -1 is refused"),
        ({"answer": {"members": ["a"], "temperature": 1}}, "temperature means nothing"),
        ({"answer": {"members": ["a"], "update": True}}, "update means nothing"),
        (
            {"answer": {"members": ["a"], "update": 1}},
            "update: 1 is refused: it should be a valid boolean",
        ),
        (
            {"cascade": {"stages": ["a", "b"], "thresholds": [0.5], "timeouts_s": [1, 2]}},
            "timeouts_s has 2 entries; 2 stages need 1",
        ),
        (
            {"cascade": {"stages": ["a", "b"], "thresholds": [0.5], "timeouts_s": [0]}},
            "timeouts_s.0: 0 is refused: it should be greater than or equal to 0.001",
        ),
        (
            {"cascade": {"stages": ["a", "b"], "thresholds": [0.5], "timeouts_s": ["1s"]}},
            "timeouts_s.0: '1s' is refused: it should be a valid number",
        ),
        (
            {"answer": {"members": ["a"], "weights": "evidence", "temperature": 0}},
            "temperature: 0 is refused: it should be greater than or equal to 0.000001",
        ),
        ({"answer": {"members": ["a"], "rule": "contrastive"}}, "needs two members"),
        (
            {"answer": {"members": ["a", "b"], "rule": "contrastive", "weights": [1, 1]}},
            "takes none",
        ),
        ({"best": {"candidates": ["a"], "scorer": 3}}, "best.scorer: 3"),
        ({"cascade": {"stages": ["a", "b"]}}, "0 entries; 2 stages need 1"),
        (
            {"cascade": {"stages": ["a", "b"], "thresholds": [2]}},
            "thresholds.0: 2 is refused: it should be less than or equal to 1",
        ),
        ({"cascade": {"stages": ["a"], "scorer": 3}}, "cascade.scorer: 3"),
        ({"best": {"candidates": []}}, "best.candidates is empty"),
        (
            {"best": {"candidates": ["a"], "select": "first"}},
            "'first' is refused: it should be 'majority', 'confidence'",
        ),
    ],
)
def test_bad_plans_are_refused_by_name(data: object, message: str) -> None:
    """What is wrong, the value and what is allowed stand in the error."""
    with pytest.raises(PlanError, match=message):
        from_json(data)


FUSED = {"answer": {"members": ["a", "b"], "weights": "evidence"}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 1e-308),
        ("temperature", 1e308),
        ("temperature", float("inf")),
        ("gate", float("nan")),
        ("contrast", 1e308),
        ("weights", [1e308, 1e308]),
        ("weights", [1e-308, 0]),
        ("weights", [float("inf"), 1]),
    ],
)
def test_numbers_that_engines_could_not_compute_with_are_refused(key: str, value: object) -> None:
    """What would end as NaN or infinity in 32 bits is no plan, in JSON or in code."""
    body = {**FUSED["answer"], key: value}
    with pytest.raises(PlanError, match=f"answer.{key}"):
        from_json({"answer": body})


def test_plans_made_in_code_are_held_to_the_same() -> None:
    """A policy cannot make what a request may not send."""
    with pytest.raises(ValueError, match="temperature"):
        Answer(members=("a", "b"), weighting="evidence", temperature=1e-308)


def nested(depth: int) -> dict[str, object]:
    """Return the JSON of a plan that nests `depth` deep."""
    plan: dict[str, object] = {"answer": {"members": ["a"]}}
    for _ in range(depth - 1):
        plan = {"best": {"candidates": [plan]}}
    return plan


BOUNDS = PlanBounds(depth=3, stages=2, candidates=3, members=2, lanes=5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (nested(4), "nests deeper than the 3 allowed"),
        (nested(50_000), "nests deeper than the 3 allowed"),
        ({"best": {"candidates": ["a"] * 4}}, "candidates has 4 entries; at most 3"),
        ({"best": {"candidates": ["a"] * 50_000}}, "candidates has 50000 entries; at most 3"),
        ({"cascade": {"stages": ["a"] * 3}}, "stages has 3 entries; at most 2"),
        ({"cascade": {"stages": ["a"], "thresholds": [0] * 9}}, "thresholds has 9 entries"),
        ({"answer": {"members": ["a", "b", "c"]}}, "members has 3 entries; at most 2"),
        ({"answer": {"members": ["a"], "weights": [1] * 9}}, "weights has 9 entries; at most 2"),
        ({"best": {"candidates": [FUSED] * 3}}, "more than the 5 members allowed in all"),
    ],
)
def test_large_plans_are_refused_before_they_are_made(data: object, message: str) -> None:
    """Depth, width and members in all are bounded, however large the JSON is."""
    with pytest.raises(PlanError, match=message):
        from_json(data, BOUNDS)


def test_plans_at_their_bounds_are_read() -> None:
    """The bounds themselves are allowed."""
    stage = {"best": {"candidates": [FUSED, "a", "b"]}}
    data = {"cascade": {"stages": ["a", stage], "thresholds": [0.5]}}
    assert from_json(data, BOUNDS) == from_json(data)
    assert from_json(nested(3), BOUNDS)


def test_lanes_are_counted_where_members_run_together() -> None:
    """Candidates run side by side, stages one after another."""
    best = {"best": {"candidates": [FUSED, "a"]}}
    cascade = from_json({"cascade": {"stages": [best, "a"], "thresholds": [0.5]}})
    assert num_lanes(from_json(FUSED)) == 2
    assert num_lanes(from_json(best)) == 3
    assert num_lanes(cascade) == 3


@pytest.mark.parametrize(
    "data",
    [
        {"answer": {"members": ["a"], "rule": "mixture"}},
        {"answer": {"members": ["a", "b"], "rule": "gated", "weights": [1.0, 2.0], "gate": 0.5}},
        {
            "cascade": {
                "stages": [
                    {"answer": {"members": ["a"], "rule": "mixture"}},
                    {
                        "best": {
                            "candidates": [{"answer": {"members": ["b"], "rule": "mixture"}}],
                            "select": "scorer",
                            "scorer": "s",
                        }
                    },
                ],
                "thresholds": [0.5],
                "scorer": "confidence",
                "timeouts_s": [None],
            }
        },
    ],
)
def test_json_is_what_it_was(data: dict[str, object]) -> None:
    """The form in which plans are kept in ledgers and files, key by key."""
    assert json.dumps(to_json(from_json(data))) == json.dumps(data)
