"""Outcomes brought together, divided and summed up."""

import math

import pytest

from policies.errors import OutcomesError
from policies.outcome_sets import agreements, dedupe, divide, fold_names, merge, summarise
from policies.outcomes import Outcome


def outcome(query: str, *tags: str, **scores: float) -> Outcome:
    """An outcome with these scores."""
    return Outcome(query=query, scores=scores, tags=tags)


LONG = "what is the capital of the country where the longest river of the continent ends"


def test_files_of_one_model_each_come_together() -> None:
    """One outcome per query, with the models of all parts; a later score of a model counts."""
    first = [outcome("a", ada=1), outcome("b", ada=0)]
    second = [outcome("b", bob=0.5), outcome("a", ada=0, bob=1)]
    assert [o.scores for o in merge([first, second])] == [
        {"ada": 0, "bob": 1},
        {"ada": 0, "bob": 0.5},
    ]


def test_samples_of_a_query_stay_apart() -> None:
    """What a file says twice of a query are two draws, in either file."""
    first = [Outcome(query="a", id=f"1/{n}", scores={"ada": n}) for n in range(2)]
    second = [Outcome(query="a", id=f"1/{n}", scores={"bob": 1 - n}) for n in range(2)]
    assert [o.scores for o in merge([first, second])] == [
        {"ada": 0, "bob": 1},
        {"ada": 1, "bob": 0},
    ]


def test_whatever_their_programs_call_them_the_same_query_comes_together() -> None:
    """Ids are other programs' own: "alpaca/7" is no seventh draw."""
    first, second = (
        Outcome(query="a", id="alpaca/7", scores={"ada": 1}),
        Outcome(query="a", id="1/0", scores={"bob": 0}),
    )
    assert [o.scores for o in merge([[first], [second]])] == [{"ada": 1, "bob": 0}]


def test_repeats_are_left_out_and_divided_together() -> None:
    """Near duplicates count as one question, wherever they stand."""
    rows = [outcome(f"{LONG} number {n}", ada=1) for n in range(3)]
    rows += [outcome(f"question {n} of quite another kind {n * n}", ada=1) for n in range(80)]
    rows.append(outcome(LONG.upper() + "!", ada=0))
    kept = dedupe(rows)
    assert [o.query for o in kept if "capital" in o.query.lower()] == [rows[0].query]
    for seed in range(12):
        divided = divide(rows, seed=seed)
        assert len({o.split for o in divided if "capital" in o.query.lower()}) == 1
        folds = fold_names(rows, num_folds=5, seed=seed)
        near = {f for f, o in zip(folds, rows, strict=True) if "capital" in o.query.lower()}
        assert len(near) == 1 and len(set(folds)) == 5


def test_the_share_is_kept_and_must_be_one() -> None:
    """About so many go into the test; a share outside (0, 1) is refused."""
    rows = [outcome(f"{n} {n * n} {n**3} {n**4}", ada=1) for n in range(600)]
    tests = sum(o.split == "test" for o in divide(rows, test_share=0.25))
    assert 110 < tests < 190  # 150 expected, standard deviation 11
    with pytest.raises(OutcomesError, match="not between 0 and 1"):
        divide(rows, test_share=1.0)


def test_statistics_say_what_is_missing_and_what_choosing_can_gain() -> None:
    """Missing scores by model; ties, best single and oracles over the complete queries."""
    rows = [
        outcome("a", "x", ada=1, bob=0),
        outcome("b", "x", ada=1, bob=1),
        outcome("c", "y", ada=0, bob=1),
        outcome("d", "y", ada=0, bob=0),
        outcome("e", "y", ada=1),
    ]
    found = summarise(rows)
    ada, bob = found.models
    assert (ada.num_scored, ada.num_missing, bob.num_missing) == (5, 0, 1)
    assert ada.score == pytest.approx(0.6) and bob.score == pytest.approx(0.5)
    assert found.num_complete == 4 and found.ties == 0.5
    assert found.best_single == 0.5 and found.oracle == 0.75 and found.task_oracle == 0.75
    assert found.tasks == {"x": 2, "y": 3}


def test_one_task_has_no_oracle_and_no_complete_query_no_gap() -> None:
    """What cannot be known is None or NaN, never a number."""
    assert summarise([outcome("a", "x", ada=1, bob=0)]).task_oracle is None
    found = summarise([outcome("a", ada=1), outcome("b", bob=0)])
    assert found.num_complete == 0 and math.isnan(found.oracle)


def test_a_judge_is_held_against_references() -> None:
    """Of two answers that one grader tells apart, how often another prefers the same."""
    grades = [
        {"exact": {"a": 1.0, "b": 0.0}, "judge": {"a": 0.9, "b": -3.0}},
        {"exact": {"a": 0.0, "b": 1.0}, "judge": {"a": 0.5, "b": 0.5}},
        {"exact": {"a": 1.0, "b": 1.0}, "judge": {"a": 1.0, "b": 0.0}},
    ]
    rows = [Outcome(query="q", scores={"a": 1}, grades=one) for one in grades]
    found = {(pair.one, pair.other): (pair.num_pairs, pair.share) for pair in agreements(rows)}
    assert found == {("exact", "judge"): (2, 0.75), ("judge", "exact"): (2, 0.75)}
