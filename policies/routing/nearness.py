"""What lies near a query: landmarks, which let linear heads bend, and clusters of training queries.

Landmarks are features φ whose products are the Gaussian kernel of unit vectors, φ(x)·φ(y) ≈
exp(γ(cos(x, y) - 1)), by Nyström's method (Williams & Seeger 2001): exact where x or y is one of
the landmarks, which are drawn from the training queries. Ridge regression on them is kernel ridge
regression. Clusters say what each model scored in a neighbourhood: the `Clusters` policy routes by
it, label enhancement uses it where queries have no tags, and a query near to none of them is unlike
anything in training: `Doubt` says what to expect then.

Shape legend: Q queries, D dimensions of a point, L landmarks, N features (at most L), K clusters,
M models, U steps of a distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.model_selection import GroupKFold, KFold

from policies.encoders.base import Encoded
from policies.routing.heads import mean_scores

Floats = NDArray[np.float32]

LEAST_EIGENVALUE = 1e-3
"""Directions in which the landmarks' kernel is smaller than this say the same as others."""

FAINT_SHARE = 0.01
"""So many training queries have points so short that their direction begins to mean little."""

SHRINKAGE = 5.0
"""Pseudo-queries with the global mean score that each cluster starts with."""

LEAST_LIKENESS = 0.4
"""A query this near to a cluster, relative to the median new query like training, is familiar."""

NUM_FOLDS = 5
"""Parts of the training queries, by which similarities of new ones are estimated."""

NUM_STEPS = 101
"""Quantiles that a distribution of similarities is kept as."""


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


@dataclass(frozen=True, kw_only=True)
class Topics:
    """Unit centroids, the models' mean scores in each cluster, and its size."""

    centroids_KD: Floats
    scores_KM: Floats
    sizes_K: NDArray[np.int64]

    def assign(self, points_QD: Floats) -> NDArray[np.int64]:
        """Return the nearest cluster of every query."""
        return np.asarray((points_QD @ self.centroids_KD.T).argmax(1))

    def similarities(self, points_QD: Floats) -> Floats:
        """Return how similar every query is to its nearest cluster, [Q]."""
        nearest_Q: Floats = (points_QD @ self.centroids_KD.T).max(1)
        return nearest_Q


def fit_topics(
    points_QD: Floats,
    scores_QM: NDArray[np.float64],
    *,
    num_clusters: int,
    seed: int,
) -> Topics:
    """Cluster by spherical k-means; scores are shrunk towards each model's global mean."""
    norms = np.linalg.norm(points_QD, axis=1, keepdims=True)
    units = points_QD / np.maximum(norms, 1e-6)
    num_distinct = len({unit.tobytes() for unit in units})
    num_clusters = max(1, min(num_clusters, len(units) // 10, num_distinct))
    kmeans = KMeans(num_clusters, n_init=1, max_iter=50, random_state=seed).fit(units)
    centroids = kmeans.cluster_centers_
    centroids = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-6)
    similarity = points_QD @ centroids.T
    labels = similarity.argmax(1)
    known = ~np.isnan(scores_QM)
    values = np.where(known, scores_QM, 0.0)
    member = np.eye(num_clusters)[labels].T
    scores = (member @ values + SHRINKAGE * mean_scores(scores_QM)) / (member @ known + SHRINKAGE)
    return Topics(
        centroids_KD=centroids.astype(np.float32),
        scores_KM=scores.astype(np.float32),
        sizes_K=np.bincount(labels, minlength=num_clusters),
    )


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """What to expect of models where a query is unlike the training queries.

    It is where its similarity is below `familiar_above`. Whole tasks that were left out of
    training show what then remains: `left_out_M` are the models' mean scores on those of their
    queries that were unfamiliar, `left_out_similarity_U` (ascending) how similar these were. A
    query less like training than they were has less to go by than they had, and so its prediction
    shrinks further, to nothing where no left-out query was as strange. What is said beside a query
    is small talk, and no request, where its similarity and its `talk` together are `talk_above`.
    """

    familiar_above: float
    left_out_M: Floats
    left_out_similarity_U: Floats
    talk_above: float = 0.0

    def trust(self, similarity: float) -> float:
        """Return the share of left-out, unfamiliar queries that were no more like training."""
        below = int(self.left_out_similarity_U.searchsorted(similarity, side="right"))
        return below / max(1, len(self.left_out_similarity_U))

    def shrunk(self, quality_QM: NDArray[np.float64], similarity_Q: Floats) -> NDArray[np.float64]:
        """Return the predictions, those of unfamiliar queries replaced by what is left of them."""
        kept_QM = quality_QM.copy()
        for q in np.flatnonzero(similarity_Q < self.familiar_above):
            kept_QM[q] = self.left_out_M * self.trust(float(similarity_Q[q]))
        return kept_QM


def fit_doubt(
    points_QD: Floats,
    scores_QM: NDArray[np.float64],
    tasks: Sequence[str],
    *,
    num_clusters: int,
    unfamiliar_share: float,
    seed: int,
) -> Doubt:
    """Set the threshold and see what left-out tasks would have got, both by cross-validation.

    About `unfamiliar_share` of new queries like the training's fall below the threshold, fewer
    where they are so uniform that any other wording would. With a single task nothing was left out:
    then nothing is expected of any model on unfamiliar queries.
    """

    def unseen(folds: Iterable[tuple[NDArray[np.intp], NDArray[np.intp]]]) -> Floats:
        similarity_Q = np.empty(len(points_QD), np.float32)
        for seen, out in folds:
            topics = fit_topics(
                points_QD[seen], scores_QM[seen], num_clusters=num_clusters, seed=seed
            )
            similarity_Q[out] = topics.similarities(points_QD[out])
        return similarity_Q

    in_domain_Q = unseen(KFold(NUM_FOLDS, shuffle=True, random_state=seed).split(points_QD))
    median, tail = np.quantile(in_domain_Q, [0.5, unfamiliar_share])
    familiar_above = float(min(tail, LEAST_LIKENESS * median))
    num_tasks = len(set(tasks))
    left_out_M = np.zeros(scores_QM.shape[1], np.float32)
    similarity_U = np.empty(0, np.float32)
    if num_tasks > 1:
        left_out = GroupKFold(min(2 * NUM_FOLDS, num_tasks)).split(points_QD, groups=tasks)
        left_out_Q = unseen(left_out)
        strange_Q = left_out_Q < familiar_above
        if strange_Q.any():
            left_out_M = mean_scores(scores_QM[strange_Q]).astype(np.float32)
            steps = np.linspace(0, 1, NUM_STEPS)
            similarity_U = np.quantile(left_out_Q[strange_Q], steps).astype(np.float32)
    return Doubt(
        familiar_above=familiar_above,
        left_out_M=left_out_M,
        left_out_similarity_U=similarity_U,
    )


class Nearness:
    """Landmarks and centroids as rows of one matrix, which meets the centred point."""

    def __init__(self, landmarks: Landmarks, topics: Topics) -> None:
        self._centre_D = landmarks.centre_D
        self._rows_D = np.concatenate((landmarks.units_LD, topics.centroids_KD))
        # A centroid's product with the point is that with the centred point, and this.
        self._centres_share_K: Floats = topics.centroids_KD.dot(landmarks.centre_D)
        self._num_landmarks = len(landmarks.units_LD)
        self._sharpness = landmarks.sharpness
        self._sharpness_array = np.array(landmarks.sharpness, np.float32)  # quicker to subtract
        self._faint = landmarks.faint

    def of(self, point_D: Floats) -> tuple[Floats, int, float]:
        """Return the kernel [L] at a point, the nearest cluster, and how similar it is."""
        centred_D = point_D - self._centre_D
        products = self._rows_D.dot(centred_D)
        near_L = products[: self._num_landmarks]
        near_L *= self._sharpness / max(math.sqrt(centred_D.dot(centred_D)), 1e-6)
        near_L -= self._sharpness_array
        np.exp(near_L, out=near_L)
        length = math.sqrt(point_D.dot(point_D))
        if length < self._faint:
            near_L *= length / self._faint
        similarity_K = products[self._num_landmarks :]
        similarity_K += self._centres_share_K
        cluster = int(similarity_K.argmax())
        return near_L, cluster, float(similarity_K[cluster])
