"""What lets linear heads bend: how near a query is to some of the training queries.

Features φ whose products are the Gaussian kernel of unit vectors, φ(x)·φ(y) ≈ exp(γ(cos(x, y) - 1))
by Nyström's method (Williams & Seeger 2001): exact where x or y is one of the landmarks, which are
drawn from the training queries. Ridge regression on them is kernel ridge regression.

Shape legend: Q queries, D dimensions of a point, L landmarks, N features (at most L).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from policies.encoders.base import Encoded

Floats = NDArray[np.float32]

LEAST_EIGENVALUE = 1e-3
"""Directions in which the landmarks' kernel is smaller than this say the same as others."""

FAINT_SHARE = 0.01
"""So many training queries have points so short that their direction begins to mean little."""


@dataclass(frozen=True, kw_only=True)
class Landmarks:
    """Landmarks as unit vectors, less the training queries' mean point `centre_D`.

    `mix_LN` makes features of the kernel's values. The features of a point shorter than `faint`
    fade with its length: a query that has nothing in common with training is near to nothing.
    """

    centre_D: Floats
    units_LD: Floats
    mix_LN: Floats
    sharpness: float
    faint: float

    @property
    def num_features(self) -> int:
        """N, the number of features."""
        return int(self.mix_LN.shape[1])

    def features(self, points_QD: Floats) -> Floats:
        """Return φ [Q, N] of points in the encoder's space."""
        return self.kernel(points_QD) @ self.mix_LN

    def kernel(self, points_QD: Floats) -> Floats:
        """Return how near points are to the landmarks, [Q, L]; φ is a linear map of it."""
        lengths_Q1 = np.sqrt(np.einsum("qd,qd->q", points_QD, points_QD))[:, None]
        centred_QD = points_QD - self.centre_D
        norms_Q1 = np.sqrt(np.einsum("qd,qd->q", centred_QD, centred_QD))[:, None]
        cosines_QL = centred_QD @ self.units_LD.T
        cosines_QL /= np.maximum(norms_Q1, 1e-6)
        cosines_QL -= 1
        cosines_QL *= np.float32(self.sharpness)
        near_QL: Floats = np.exp(cosines_QL, out=cosines_QL)
        near_QL *= np.minimum(lengths_Q1 / np.float32(self.faint), 1)
        return near_QL

    def beside(self, encoded: Encoded) -> sp.csr_matrix:
        """Return the encoder's features with φ beside them, [Q, F + N]."""
        if not self.num_features:
            return encoded.matrix_QF
        near = sp.csr_matrix(self.features(encoded.points_QD))
        return sp.csr_matrix(sp.hstack([encoded.matrix_QF, near], dtype=np.float32))


def no_landmarks(num_dimensions: int) -> Landmarks:
    """Return landmarks without any feature."""
    return Landmarks(
        centre_D=np.zeros(num_dimensions, np.float32),
        units_LD=np.zeros((0, num_dimensions), np.float32),
        mix_LN=np.zeros((0, 0), np.float32),
        sharpness=1.0,
        faint=1.0,
    )


def fit_landmarks(
    points_QD: Floats, *, num_landmarks: int, sharpness: float, weight: float, seed: int
) -> Landmarks:
    """Draw landmarks from the training queries: `num_landmarks`, at most a tenth of them.

    The features' norm is at most √`weight`: the larger, the less what the heads learn from them
    is regularised.
    """
    centre_D = points_QD.mean(0)
    num_landmarks = min(num_landmarks, len(points_QD) // 10)
    drawn = np.random.default_rng(seed).permutation(len(points_QD))[:num_landmarks]
    units_LD = points_QD[drawn] - centre_D
    units_LD /= np.maximum(np.linalg.norm(units_LD, axis=1, keepdims=True), 1e-6)
    kernel_LL = np.exp(sharpness * (units_LD @ units_LD.T - 1)).astype(np.float64)
    eigenvalues, vectors_LL = np.linalg.eigh(kernel_LL)
    kept = eigenvalues > LEAST_EIGENVALUE
    mix_LN = vectors_LL[:, kept] * np.sqrt(weight / eigenvalues[kept])
    lengths_Q = np.linalg.norm(points_QD, axis=1)
    return Landmarks(
        centre_D=centre_D.astype(np.float32),
        units_LD=units_LD.astype(np.float32),
        mix_LN=mix_LN.astype(np.float32),
        sharpness=sharpness,
        faint=max(float(np.quantile(lengths_Q, FAINT_SHARE)), 1e-6),
    )
