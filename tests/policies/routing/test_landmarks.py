"""Landmarks: a kernel as features, and what linear heads learn with it."""

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from policies.encoders.ngrams import NGrams
from policies.routing.heads import ridge_regression
from policies.routing.nearness import Landmarks, fit_landmarks, no_landmarks


def drawn_points(num_points: int = 200) -> NDArray[np.float32]:
    """Return points of norm 1 in six dimensions (seed 0)."""
    points = np.random.default_rng(0).normal(size=(num_points, 6))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def fitted(points: NDArray[np.float32], weight: float = 1.0) -> Landmarks:
    """Return landmarks of the sharpness that the tests' kernel has."""
    return fit_landmarks(points, num_landmarks=20, sharpness=2.0, weight=weight, seed=0)


def test_products_of_features_are_the_kernel_at_the_landmarks() -> None:
    """Between a landmark and any point Nyström's approximation is exact, times the weight."""
    points = drawn_points()
    landmarks = fitted(points, weight=4.0)
    assert landmarks.units_LD.shape == (20, 6)
    units = points - points.mean(0)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    phi = landmarks.features(points)
    own = np.random.default_rng(0).permutation(len(points))[:20]
    kernel = 4 * np.exp(2.0 * (units[own] @ units.T - 1))
    np.testing.assert_allclose(phi[own] @ phi.T, kernel, atol=0.02)
    assert np.all(np.einsum("qn,qn->q", phi, phi) < 4.01)


def test_a_point_without_content_is_near_nothing() -> None:
    """The features of a query that shares nothing with training fade to zero."""
    landmarks = fitted(drawn_points())
    assert not landmarks.features(np.zeros((1, 6), np.float32)).any()


def test_no_landmarks_leave_the_features_alone() -> None:
    """Where there are none, nothing stands beside the encoder's features."""
    encoded = NGrams(bits=8, num_dimensions=4).fit(["one two", "two three"]).encode(["two one"])
    assert no_landmarks(4).beside(encoded) is encoded.matrix_QF
    assert no_landmarks(4).features(encoded.points_QD).shape == (1, 0)


def test_landmarks_learn_what_no_weighted_sum_can() -> None:
    """The sign of a product of two coordinates: a linear model misses it, landmarks find it."""
    points = drawn_points(1200)
    wanted = np.sign(points[:, 0] * points[:, 1])[:, None]
    landmarks = fit_landmarks(points[:600], num_landmarks=60, sharpness=2.0, weight=1.0, seed=0)

    def agreement(X: NDArray[np.float32]) -> float:
        ones = np.ones((600, 1))
        W = ridge_regression(sp.csr_matrix(X[:600]), wanted[:600], ones, ridge=0.1)
        return float(np.mean(np.sign(X[600:] @ W) == wanted[600:]))

    assert agreement(points) < 0.6
    assert agreement(landmarks.features(points)) > 0.75
