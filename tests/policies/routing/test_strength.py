"""How firmly heads are held back: by what choosing is worth on queries and tasks left out."""

import itertools
import math

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.model_selection import KFold

from policies.routing.strength import (
    NUM_BINS,
    SHARES,
    USUAL,
    WHOLE,
    Belief,
    Strength,
    choose_belief,
    choose_strength,
    fit_belief,
    left_out,
    policy_values,
    prices,
)

NAN = float("nan")
RIDGES = (0.1, 10.0, 1000.0)


def test_policy_value_by_hand() -> None:
    """At no price the best predicted model's score; at a price the cheaper one; known ones only."""
    scores = np.array([[0.0, 1.0], [1.0, 1.0], [NAN, 0.0]])
    predicted = np.array([[0.4, 0.6], [0.5, 0.6], [0.9, 0.1]])
    free, dear = np.zeros((1, 2)), np.array([[0.0, 0.5]])
    assert policy_values(predicted, scores, free).mean() == pytest.approx(2 / 3)
    # The dear model still answers the last query, where nothing else is known.
    assert policy_values(predicted, scores, dear).mean() == pytest.approx((0 + 1 - 0.5) / 3)


def test_only_the_better_of_two_has_a_price() -> None:
    """From nothing to twice its lead, which half-way up is paid for; among more there is none."""
    found = prices(np.array([[0.0, 1.0], [0.0, 0.5], [NAN, 0.75]]))
    np.testing.assert_allclose(found[0], 0)
    np.testing.assert_allclose(found[len(found) // 2], [0, 0.75])
    np.testing.assert_allclose(found[-1], [0, 1.5])
    np.testing.assert_array_equal(prices(np.array([[0.0, 1.0, 0.5]])), [[0, 0, 0]])


def test_left_out_predictions_are_those_of_ridge_regression() -> None:
    """Equal to the normal equations of the other folds' known scores, model by model (seed 0)."""
    rng = np.random.default_rng(0)
    X, scores = rng.normal(size=(40, 6)), rng.random((40, 3))
    scores[rng.random((40, 3)) < 0.2] = NAN
    parts = list(KFold(4).split(X))[:3]
    found = left_out(sp.csr_matrix(X), scores, [("all",)] * 40, parts, ridge=2.0)
    # Of a single tag, whose mean is everybody's, nothing is left to learn.
    np.testing.assert_allclose(found.tagged_LM, 0, atol=1e-6)
    np.testing.assert_allclose(found.deviations(0.25), 0.25 * found.own_LM, atol=1e-6)
    start = 0
    for seen, out in parts:
        for model in range(3):
            rows = seen[~np.isnan(scores[seen, model])]
            inner = X[rows].T @ X[rows] + 2.0 * np.eye(6)
            above = scores[rows, model] - scores[rows, model].mean()
            weights = np.linalg.solve(inner, X[rows].T @ above)
            own = found.own_LM[start : start + len(out), model]
            np.testing.assert_allclose(own, X[out] @ weights, atol=2e-3)
        start += len(out)
    assert len(found.own_LM) == start


def fields(num_tasks: int) -> tuple[sp.csr_matrix, np.ndarray, np.random.Generator]:
    """Return features that tell a query's task of `num_tasks`, and the tasks (seed 0)."""
    rng = np.random.default_rng(0)
    task_Q = rng.integers(num_tasks, size=400)
    X = np.eye(num_tasks)[task_Q] + rng.normal(size=(400, num_tasks), scale=0.1)
    return sp.csr_matrix(X), task_Q, rng


def chosen(X: sp.csr_matrix, scores: np.ndarray, tasks: np.ndarray) -> Strength:
    """Return what is chosen of β in {0, 1} and three ridges."""
    return choose_strength(X, scores, tagged(tasks), betas=(0.0, 1.0), ridges=RIDGES, seed=0)


def tagged(tasks: np.ndarray) -> list[tuple[str]]:
    """Return every query's tags: its task alone."""
    return [(f"task {task}",) for task in tasks]


def test_coin_flips_are_held_firmly_and_fields_loosely() -> None:
    """Models that know a field each are told apart; ones that differ by luck are not."""
    X, task_Q, rng = fields(8)
    knows = np.eye(8)[task_Q]
    knows[3, 2] = NAN
    assert chosen(X, knows, task_Q).ridge < 1000
    # Flips, but for a model that is better throughout: whatever else is learned does harm.
    flips = (rng.random((400, 8)) < [0.7, *[0.4] * 7]).astype(float)
    assert chosen(X, flips, task_Q).ridge == 1000


def test_a_skill_that_carries_over_to_other_tasks_is_used() -> None:
    """A feature of all tasks that says who is right is worth its weight on tasks left out.

    Model 1 is right in 60%; model 0 in 95% where the feature says so, and in 5% elsewhere (seed 0).
    """
    rng = np.random.default_rng(0)
    task_Q, hint_Q = rng.integers(12, size=600), rng.integers(2, size=600)
    X = sp.csr_matrix(np.column_stack([hint_Q, 1 - hint_Q]).astype(float))
    right = np.column_stack([0.05 + 0.9 * hint_Q, np.full(600, 0.6)])
    assert chosen(X, (rng.random((600, 2)) < right).astype(float), task_Q).ridge < 1000


def test_without_a_query_that_two_models_answered_the_usual_is_taken() -> None:
    """As in a ledger, where each query has one score; a single candidate is never judged."""
    X, task_Q, _ = fields(4)
    lonely = np.where(np.eye(4)[task_Q] > 0, 1.0, NAN)
    assert chosen(X, lonely, task_Q) == USUAL
    only = choose_strength(X, lonely, tagged(task_Q), betas=(0.3,), ridges=(7.0,), seed=0)
    assert only == Strength(beta=0.3, ridge=7.0)
    points = X.toarray().astype(np.float32)
    belief = choose_belief(X, points, lonely, tagged(task_Q), only, num_clusters=16, seed=0)
    assert belief is WHOLE


def test_own_scores_count_where_there_are_queries_enough_to_learn_from() -> None:
    """Within tasks a feature says who is right, but a noisy one: of 200 queries the tasks' means
    choose as well or better, of 6,000 the queries' own scores do (seed 0).
    """
    rng = np.random.default_rng(0)
    task_Q, hint_QF = rng.integers(4, size=6000), rng.normal(size=(6000, 300))
    X = sp.csr_matrix(np.hstack([2 * np.eye(4)[task_Q], hint_QF / math.sqrt(300)]))
    hint_Q = np.sign(hint_QF @ rng.normal(size=300))
    favour_Q = 0.4 * np.array([1, 1, -1, -1])[task_Q] + 0.5 * hint_Q
    right = 0.5 + 0.5 * np.column_stack([favour_Q, -favour_Q])
    scores = (rng.random((6000, 2)) < right).astype(float)
    assert chosen(X, scores, task_Q).beta == 1
    few = np.arange(200)
    assert chosen(X[few], scores[few], task_Q[few]).beta == 0


def test_what_misleads_on_new_tasks_is_believed_on_known_ones_alone() -> None:
    """Tasks are alike by twos, and every task has one model of its own that knows it.

    So what is learned of one does harm on its twin, where that was left out, and model 0 is better:
    of queries unlike training less is believed, of those like it all (seed 0).
    """
    X, task_Q, _ = fields(12)
    X = sp.hstack([X, 2 * np.eye(6)[task_Q // 2]]).tocsr()
    knows = np.zeros((400, 13))
    knows[:, 0] = 0.6
    knows[np.arange(400), 1 + task_Q] = 1.0
    strength = chosen(X, knows, task_Q)
    assert strength.ridge < 1000
    points = X.toarray().astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    belief = choose_belief(X, points, knows, tagged(task_Q), strength, num_clusters=16, seed=0)
    assert belief.shares_B[0] < 1 and belief.shares_B[-1] == 1
    assert (np.diff(belief.shares_B) >= 0).all() and (np.diff(belief.edges) >= 0).all()
    low, high = belief.edges[0] - 1, belief.edges[-1] + 1
    np.testing.assert_array_equal(belief.of([low, high]), belief.shares_B[[0, -1]])


def test_shares_of_belief_are_the_best_that_ascend() -> None:
    """Compared with trying all sequences, where deviations mislead at low similarity (seed 0)."""
    rng = np.random.default_rng(0)
    number = 900
    similarity = rng.random(number).astype(np.float32)
    scores, mean = rng.random((number, 4)), np.array([0.5, 0.52, 0.48, 0.5])
    right = (similarity[:, None] - 0.4) * (scores - mean)
    deviations = right + 0.05 * rng.normal(size=(number, 4))
    free = np.zeros((1, 4))
    found = fit_belief(similarity, deviations, scores, mean, free)

    def worth(belief: Belief) -> float:
        shares = belief.of(similarity)[:, None]
        return float(policy_values(mean + shares * deviations, scores, free).mean())

    every = itertools.combinations_with_replacement(SHARES, NUM_BINS)
    tried = [worth(Belief(edges=found.edges, shares_B=np.array(shares))) for shares in every]
    assert worth(found) == pytest.approx(max(tried))
    assert worth(found) > worth(WHOLE)


def test_less_is_believed_only_where_that_surely_pays() -> None:
    """Where deviations are right in all bins alike, less of them gains nothing but by chance: in at
    least eight of ten draws of 300 queries all is believed.
    """
    less = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        similarity = rng.random(300).astype(np.float32)
        scores = (rng.random((300, 2)) < [0.6, 0.7]).astype(float)
        deviations = 0.2 * (scores - [0.6, 0.7]) + 0.1 * rng.normal(size=(300, 2))
        rising = np.linspace(0, 0.2, 9)[:, None] * [0, 1]
        found = fit_belief(similarity, deviations, scores, np.array([0.6, 0.7]), rising)
        less += found is not WHOLE
    assert less <= 2
