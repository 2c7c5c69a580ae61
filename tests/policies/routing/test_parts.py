"""The parts of training: targets, heads, calibration, clusters."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import check_grad
from scipy.special import expit

from policies.routing import heads
from policies.routing.fit import reliability
from policies.routing.heads import (
    Heads,
    Objective,
    distribution,
    enhance,
    fit_differences,
    fit_levels,
    fit_platt,
    ridge_regression,
    with_differences,
)
from policies.routing.nearness import fit_topics

NAN = float("nan")


def test_label_enhancement_mixes_in_the_tags_mean() -> None:
    """ZOOTER's formula by hand: β·own + (1 - β)·mean over the query's tags."""
    scores = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, NAN]])
    got = enhance(scores, [["a"], ["a"], ["a", "b"]], beta=0.3)
    mean_a, mean_b = np.array([2 / 3, 0.0]), np.array([1.0, NAN])
    np.testing.assert_allclose(got[0], 0.3 * scores[0] + 0.7 * mean_a)
    np.testing.assert_allclose(got[2, 0], 0.3 * 1 + 0.7 * (mean_a[0] + mean_b[0]) / 2)
    assert np.isnan(got[2, 1])
    np.testing.assert_array_equal(enhance(scores, [[], [], []], beta=0.3), scores)


def test_distribution_ignores_unknown_scores() -> None:
    """The softmax is over known scores only and sums to one."""
    got = distribution(np.array([[1.0, NAN, 0.0]]), temperature=0.5)
    np.testing.assert_allclose(got, [[expit(2), 0, 1 - expit(2)]])


def test_heads_minimise_their_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient handed to the optimiser is that of the loss (finite differences, seed 0)."""
    rng = np.random.default_rng(0)
    X = sp.csr_matrix(rng.normal(size=(12, 4)))
    scores = rng.random((12, 3))
    scores[2, 1] = NAN
    seen = {}

    def spy(function, start, **_):  # type: ignore[no-untyped-def]
        point = start + rng.normal(size=start.shape)
        seen["error"] = check_grad(
            lambda flat: function(flat)[0], lambda flat: function(flat)[1], point, epsilon=1e-4
        )
        seen["size"] = np.linalg.norm(function(point)[1])
        return type("Result", (), {"x": start})

    monkeypatch.setattr(heads, "minimize", spy)
    fit_levels(X, scores, Objective())
    assert seen["error"] < 1e-3 * seen["size"]


def test_ties_carry_a_signal() -> None:
    """Where all models agree, the heads still learn who is right (what plain KL cannot)."""
    X = sp.csr_matrix(np.repeat(np.eye(2), 50, axis=0))
    scores = np.repeat([[1.0, 1.0], [0.0, 0.0]], 50, axis=0)
    fitted = fit_levels(X, scores, Objective(l2=1e-4))
    predicted = expit(fitted.logits(X))
    assert predicted[0].min() > 0.8
    assert predicted[-1].max() < 0.2
    blind = fit_levels(X, scores, Objective(l2=1e-4, tie_weight=0))
    np.testing.assert_allclose(expit(blind.logits(X)), 0.5, atol=0.05)


def test_a_warm_start_ends_at_the_same_heads() -> None:
    """The objective has one minimum: where it starts changes only how long it takes (seed 0)."""
    rng = np.random.default_rng(0)
    X = sp.csr_matrix(rng.normal(size=(60, 5)))
    scores = rng.random((60, 2))
    cold = fit_levels(X, scores, Objective(l2=0.1, max_iterations=200))
    elsewhere = Heads(weights_FM=np.ones((5, 2), np.float32), bias_M=np.ones(2, np.float32))
    warm = fit_levels(X, scores, Objective(l2=0.1, max_iterations=200), start_from=elsewhere)
    np.testing.assert_allclose(warm.weights_FM, cold.weights_FM, atol=0.02)


def test_ridge_regression_solves_the_normal_equations() -> None:
    """Every column has its own weights and equals the closed form (seed 0)."""
    rng = np.random.default_rng(0)
    X, Y, weights = (
        rng.normal(size=(40, 6)),
        rng.normal(size=(40, 3)),
        rng.integers(3, size=(40, 3)),
    )
    X[:, 2] = 0
    got = ridge_regression(sp.csr_matrix(X), Y, weights.astype(float), ridge=2.0)
    for column in range(3):
        D = np.diag(weights[:, column])
        exact = np.linalg.solve(X.T @ D @ X + 2 * np.eye(6), X.T @ D @ Y[:, column])
        np.testing.assert_allclose(got[:, column], exact, atol=2e-3)


def test_differences_are_least_squares_and_levels_the_heads() -> None:
    """Models' gaps are the ridge solution's by hand; the mean over models stays the heads'."""
    X = sp.csr_matrix(np.repeat(np.eye(2, dtype=np.float32), 10, axis=0))
    scores = np.repeat([[1.0, 0.0], [0.0, 1.0]], 10, axis=0)
    level = Heads(weights_FM=np.float32([[2, 4], [0, 0]]), bias_M=np.float32([1, 1]))
    fitted = with_differences(level, fit_differences(X, scores, ridge=10.0))
    # Ten rows each: w = 10·0.5 / (10 + 10), over the slope 0.25 of the logistic at 0.5.
    np.testing.assert_allclose(fitted.weights_FM, [[3 + 1, 3 - 1], [-1, 1]], atol=1e-3)
    np.testing.assert_allclose(fitted.bias_M, 1.0, atol=1e-6)
    scores[:5, 1] = NAN
    partly = with_differences(level, fit_differences(X, scores, ridge=10.0))
    assert partly.weights_FM[0, 0] > partly.weights_FM[0, 1]


def test_platt_mends_overconfidence() -> None:
    """Logits three times too large are scaled back, unknown scores notwithstanding (seed 0)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 2))
    scores = (rng.random(logits.shape) < expit(logits)).astype(float)
    scores[::7, 0] = NAN
    platt = fit_platt(3 * logits, scores)
    assert platt.slope == pytest.approx(1 / 3, rel=0.1)
    before = reliability(expit(3 * logits).ravel(), scores.ravel()).ece
    after = reliability(platt.probabilities(3 * logits).ravel(), scores.ravel()).ece
    assert before > 0.1
    assert after < 0.03


def test_reliability_by_hand() -> None:
    """Two bins: predictions 0.2 with no hit and 0.8 with all hits miss by 0.2 each."""
    diagram = reliability(
        np.array([0.2, 0.2, 0.8, 0.8, 0.5]), np.array([0.0, 0.0, 1.0, 1.0, NAN]), num_bins=2
    )
    np.testing.assert_allclose(diagram.predicted, [0.2, 0.8])
    np.testing.assert_allclose(diagram.observed, [0.0, 1.0])
    assert diagram.ece == pytest.approx(0.2)


def test_clusters_find_groups_and_shrink_their_scores() -> None:
    """Two groups of points are told apart; means are pulled to the global one (seed 0)."""
    rng = np.random.default_rng(0)
    points = np.repeat(np.eye(2, dtype=np.float32), 50, axis=0)
    points += rng.normal(scale=0.05, size=points.shape).astype(np.float32)
    scores = np.repeat([[1.0], [0.0]], 50, axis=0)
    topics = fit_topics(points, scores, num_clusters=2, seed=0)
    near, far = np.array([[1, 0], [0.05, 0.05]], np.float32) @ topics.centroids_KD.T
    [cluster] = topics.assign(np.array([[1, 0]], np.float32))
    assert near[cluster] == near.max() == pytest.approx(1, abs=0.05)
    assert topics.sizes_K.tolist() == [50, 50]
    assert topics.scores_KM[cluster, 0] == pytest.approx((50 + 5 * 0.5) / 55)
    assert far.max() < 0.2


def test_repeated_queries_make_no_more_clusters_than_there_are() -> None:
    """Three queries asked twenty times each have three clusters, without a warning."""
    points = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    topics = fit_topics(points, np.ones((60, 1)), num_clusters=6, seed=0)
    assert topics.sizes_K.tolist() == [20, 20, 20]
