"""Clusters of training queries: what each model scored there, and how near a query is to any.

Used by the `Clusters` policy, by label enhancement where queries have no tags, and to tell that a
query is unlike anything in training.

Shape legend: Q queries, K clusters, D dimensions of a point, M models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

Floats = NDArray[np.float32]

SHRINKAGE = 5.0
"""Pseudo-queries with the global mean score that each cluster starts with."""

LEAST_LIKENESS = 0.2
"""A query this near to a cluster, relative to the median training query, is always familiar."""


@dataclass(frozen=True, kw_only=True)
class Topics:
    """Unit centroids, the models' mean scores in each cluster, and its size.

    A query whose similarity to the nearest centroid is below `familiar_above` is unlike the
    training queries.
    """

    centroids_KD: Floats
    scores_KM: Floats
    sizes_K: NDArray[np.int64]
    familiar_above: float

    def assign(self, points_QD: Floats) -> NDArray[np.int64]:
        """Return the nearest cluster of every query."""
        return np.asarray((points_QD @ self.centroids_KD.T).argmax(1))


def fit_topics(
    points_QD: Floats,
    scores_QM: NDArray[np.float64],
    *,
    num_clusters: int,
    unfamiliar_share: float,
    seed: int,
) -> Topics:
    """Cluster by spherical k-means; scores are shrunk towards each model's global mean.

    At most `unfamiliar_share` of the training queries would themselves count as unfamiliar; fewer
    where they are so uniform that any other wording would.
    """
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
    mean_M = values.sum(0) / np.maximum(known.sum(0), 1)
    scores = (member @ values + SHRINKAGE * mean_M) / (member @ known + SHRINKAGE)
    return Topics(
        centroids_KD=centroids.astype(np.float32),
        scores_KM=scores.astype(np.float32),
        sizes_K=np.bincount(labels, minlength=num_clusters),
        familiar_above=_threshold(similarity.max(1), unfamiliar_share),
    )


def _threshold(similarity_Q: NDArray[np.floating], unfamiliar_share: float) -> float:
    share = np.quantile(similarity_Q, unfamiliar_share)
    return float(min(share, LEAST_LIKENESS * np.median(similarity_Q)))
