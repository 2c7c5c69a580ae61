"""A trained router: what it predicts for a query, before anybody weighs quality against cost.

Shape legend: Q queries, F features of the encoder, N of the landmarks, M models, B bags,
D dimensions of a point, L landmarks, C columns of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from policies.encoders.base import Encoder, Features
from policies.routing.bags import Bags
from policies.routing.landmarks import Landmarks
from policies.routing.topics import Topics

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a router says of one query.

    `quality_M` are calibrated expected scores in [0, 1]; `cluster` is the nearest, `similarity`
    how near it is. `near_L` says how near the landmarks are, `likeness_M` which share of the logits
    is owed to them.
    """

    quality_M: NDArray[np.float32]
    cluster: int
    similarity: float
    near_L: NDArray[np.float32]
    likeness_M: NDArray[np.float32]
    features: Features


@dataclass(frozen=True, slots=True)
class _Products:
    """Weights of C columns: of the encoder's features, and of the landmarks' kernel."""

    weights_FC: NDArray[np.float32]
    weights_LC: NDArray[np.float32]

    def of_features(self, features: Features) -> NDArray[np.float32]:
        """Return the features' share of every column."""
        share_C: NDArray[np.float32] = features.values @ self.weights_FC.take(features.ids, axis=0)
        return share_C


@dataclass(frozen=True, kw_only=True)
class Router:
    """Encoder, landmarks, calibrated heads, clusters and bags, fitted on one set of outcomes.

    `weights_FM` [F + N, M] and the bags weigh the encoder's features, then the landmarks'.
    `output_tokens_M` are the models' mean answer lengths (NaN where unknown). `facts` is JSON
    data about the training: data hash, numbers, held-out metrics.
    """

    models: tuple[str, ...]
    encoder: Encoder
    landmarks: Landmarks
    weights_FM: NDArray[np.float32]
    bias_M: NDArray[np.float32]
    topics: Topics
    bags: Bags
    output_tokens_M: NDArray[np.float32]
    facts: Mapping[str, Any] = field(default_factory=dict)
    _heads: _Products = field(init=False, repr=False, compare=False)
    _bags: tuple[_Products, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_heads", self._products(self.weights_FM))
        # By model: a decision looks at the bags of the model that it has chosen, and no other.
        bags = np.moveaxis(self.bags.weights_FBM, 2, 0)
        object.__setattr__(self, "_bags", tuple(self._products(weights) for weights in bags))

    def _products(self, weights: NDArray[np.float32]) -> _Products:
        num_features = self.encoder.num_features
        # The landmarks' mixing is linear, as is what weighs it: one product instead of two.
        return _Products(
            np.ascontiguousarray(weights[:num_features]),
            self.landmarks.mix_LN @ weights[num_features:],
        )

    def predict(self, text: str) -> Prediction:
        """Predict for one query."""
        features = self.encoder.features(text)
        near_L = self.landmarks.kernel(features.point_D[None])[0]
        likeness_M = near_L @ self._heads.weights_LC
        logits_M = self._heads.of_features(features) + likeness_M + self.bias_M
        similarity_K = self.topics.centroids_KD @ features.point_D
        cluster = int(similarity_K.argmax())
        return Prediction(
            quality_M=1 / (1 + np.exp(-logits_M)),
            cluster=cluster,
            similarity=float(similarity_K[cluster]),
            near_L=near_L,
            likeness_M=likeness_M,
            features=features,
        )

    def spread(self, prediction: Prediction, model: int) -> float:
        """Return the bags' standard deviation of that model's score (0 without bags)."""
        products, bias_B = self._bags[model], self.bags.bias_BM[:, model]
        deviations_B = products.of_features(prediction.features) + bias_B
        deviations_B += prediction.near_L @ products.weights_LC
        return math.sqrt(deviations_B @ deviations_B / max(1, len(deviations_B)))

    def qualities(self, texts: Sequence[str]) -> Floats:
        """Return the heads' expected scores [Q, M] for many queries at once."""
        features = self.landmarks.beside(self.encoder.encode(texts))
        logits = np.asarray(features @ self.weights_FM, np.float64)
        quality: Floats = expit(logits + self.bias_M)
        return quality

    def cluster_qualities(self, texts: Sequence[str]) -> Floats:
        """Return the mean scores [Q, M] of each query's nearest cluster."""
        labels = self.topics.assign(self.encoder.encode(texts).points_QD)
        return self.topics.scores_KM[labels].astype(np.float64)
