"""Where one query lies: how near the landmarks are, and which cluster is nearest.

`Landmarks.kernel` and `Topics.assign` say the same of many queries; here one product serves both.

Shape legend: D dimensions of a point, L landmarks, K clusters.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from policies.routing.landmarks import Landmarks
from policies.routing.topics import Topics

Floats = NDArray[np.float32]


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
